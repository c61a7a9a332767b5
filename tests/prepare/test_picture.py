"""From image files of all kinds to bytes; files are written here as their formats' specifications say."""

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from pipeline.prepare.image_files import open_image
from pipeline.prepare.picture import DOUBTFUL, FRAMES, TRANSPARENT, TURNED, picture_of

GRAY, RGB, PALETTE, GRAY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # colour types of PNG
CHANNELS = {GRAY: 1, RGB: 3, PALETTE: 1, GRAY_ALPHA: 2, RGB_ALPHA: 4}
DEPTHS = {GRAY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8), GRAY_ALPHA: (8, 16), RGB_ALPHA: (8, 16)}


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def packed(values, depth):
    """Rows of values (H, N) as bytes (H, M): big-endian, each row in whole bytes."""
    bits = (values[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    return np.packbits(bits.reshape(len(values), -1), axis=1)


def png(values, colour, depth, before=(), after=()):
    """A PNG file of values (H, W, channels), with chunks before and after the pixels."""
    height, width, _ = values.shape
    rows = packed(values.reshape(height, -1), depth)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())  # filter 0 of each row
    chunks = [(b"IHDR", header), *before, (b"IDAT", pixels), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def tiff(values, depth, order="<", **tags):
    """A TIFF file of one gray channel (H, W), in one strip; `tags` by name."""
    height, width = values.shape
    data = packed(values, depth).tobytes() if depth < 16 else values.astype(f"{order}u{depth // 8}").tobytes()
    known = {
        "ImageWidth": width,
        "ImageLength": height,
        "BitsPerSample": depth,
        "Compression": 1,
        "PhotometricInterpretation": 1,
        "StripOffsets": 8,
        "SamplesPerPixel": 1,
        "RowsPerStrip": height,
        "StripByteCounts": len(data),
    }
    entries = sorted((getattr(ExifTags.Base, name).value, value) for name, value in (known | tags).items())
    data += b"\0" * (len(data) % 2)
    begin = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(data)) + data
    table = b"".join(struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value) for tag, value in entries)
    return begin + struct.pack(f"{order}H", len(entries)) + table + bytes(4)


def saved(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def read(content, size=None, channels=None, background=255):
    with open_image(io.BytesIO(content)) as image:
        return picture_of(image, size, channels, background)


def last(pixels):
    """(C, H, W) as (H, W, C)."""
    return pixels.transpose(1, 2, 0)


def random_values(depth, channels, size=(13, 16), seed=0):
    return np.random.default_rng(seed).integers(0, 2**depth, (*size, channels))


def random_rgb(height=13, width=16, seed=0):
    return random_values(8, 3, (height, width), seed).astype(np.uint8)


def blended(colour, alpha, background):
    """Oracle: colours in [0, 255] with alpha in [0, 1], in float64, rounded."""
    return np.rint(colour.astype(np.float64) * alpha + background * (1 - alpha.astype(np.float64)))


# Transparency


@pytest.mark.parametrize("background", [255, 0, 77])
@pytest.mark.parametrize(
    ("colour", "depth"), [(colour, depth) for colour in (GRAY_ALPHA, RGB_ALPHA) for depth in DEPTHS[colour]]
)
def test_an_alpha_channel_is_laid_over_the_background(colour, depth, background):
    values = random_values(depth, CHANNELS[colour], (64, 64))
    picture = read(png(values, colour, depth), background=background)
    eight = values >> 8 if depth == 16 else values  # the upper 8 bits
    expected = blended(eight[..., :-1], eight[..., -1:] / 255, background)
    assert np.array_equal(last(picture.pixels), expected)
    assert picture.remarks == {TRANSPARENT: ""}


def test_every_pair_of_colour_and_alpha_is_blended_and_rounded():
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    for background in (0, 1, 128, 254, 255):
        picture = read(png(np.stack([colour, alpha], 2), GRAY_ALPHA, 8), background=background)
        assert np.array_equal(picture.pixels[0], blended(colour, alpha / 255, background))


@pytest.mark.parametrize("background", [255, 0, 77])
@pytest.mark.parametrize("depth", DEPTHS[GRAY])
def test_a_transparent_level_of_gray_is_laid_over_the_background(depth, background):
    values = random_values(depth, 1)
    key = int(values[3, 4, 0])
    picture = read(png(values, GRAY, depth, [(b"tRNS", struct.pack(">H", key))]), background=background)
    eight = np.rint(values * 255 / (2**depth - 1))
    assert np.array_equal(last(picture.pixels), np.where(values == key, background, eight))
    assert picture.remarks == {TRANSPARENT: ""}


def test_a_transparent_colour_is_laid_over_the_background():
    values = random_values(2, 3) * 85
    key = values[3, 4]
    picture = read(png(values, RGB, 8, [(b"tRNS", struct.pack(">3H", *key))]), background=9)
    assert np.array_equal(last(picture.pixels), np.where((values == key).all(2, keepdims=True), 9, values))
    assert picture.remarks == {TRANSPARENT: ""}


def test_a_transparent_colour_of_16_bits_is_refused():
    content = png(random_values(16, 3), RGB, 16, [(b"tRNS", struct.pack(">3H", 1000, 2000, 3000))])
    with pytest.raises(ValueError, match="a transparent colour of 16 bits a channel: convert it"):
        read(content)


@pytest.mark.parametrize("kind", ["one index", "many levels"])
@pytest.mark.parametrize("depth", DEPTHS[PALETTE])
def test_a_palette_with_transparency_is_laid_over_the_background(depth, kind):
    palette = random_values(8, 3, (1, 2**depth))[0]
    alpha = np.full(2**depth, 255)
    if kind == "one index":
        alpha[1] = 0
    else:
        alpha[:] = np.random.default_rng(1).integers(0, 255, 2**depth)
    values = random_values(depth, 1)
    before = [(b"PLTE", palette.astype(np.uint8).tobytes()), (b"tRNS", alpha.astype(np.uint8).tobytes())]
    picture = read(png(values, PALETTE, depth, before), background=30)
    expected = blended(palette, alpha[:, None] / 255, 30)[values[..., 0]]
    assert np.array_equal(last(picture.pixels), expected)
    assert picture.remarks == {TRANSPARENT: ""}


@pytest.mark.parametrize("kind", ["WEBP", "TIFF", "TGA", "ICO", "GIF", "AVIF"])
def test_other_formats_with_transparency_are_laid_over_the_background(kind):
    rgba = np.zeros((16, 16, 4), np.uint8)  # as an icon: all in the alpha channel
    rgba[4:12, 4:12, 3] = 255
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {"quality": 100} if kind == "AVIF" else {}
    picture = read(saved(Image.fromarray(rgba), kind, **options))
    expected = np.full((16, 16, 3), 255.0)
    expected[4:12, 4:12] = 0
    assert np.abs(last(picture.pixels) - expected).max() <= (4 if kind == "AVIF" else 0)
    assert TRANSPARENT in picture.remarks


def test_an_opaque_alpha_channel_changes_nothing():
    rgb = random_rgb()
    opaque = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
    picture = read(saved(Image.fromarray(opaque), "PNG"), background=0)
    assert np.array_equal(last(picture.pixels), rgb)
    assert picture.remarks == {}


def test_transparent_images_become_gray_and_small_like_others():
    rgba = random_values(8, 4, (40, 40)).astype(np.uint8)
    laid = Image.fromarray(blended(rgba[..., :3], rgba[..., 3:] / 255, 200).astype(np.uint8))
    picture = read(saved(Image.fromarray(rgba), "PNG"), size=(10, 10), channels=1, background=200)
    expected = read(saved(laid, "PNG"), size=(10, 10), channels=1)
    assert np.array_equal(picture.pixels, expected.pixels)


# Orientation


STORED = {  # how an upright image lies in the file, by the meaning of the EXIF tag
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
BLOCKS = random_values(8, 3, (2, 3), seed=5).repeat(8, 0).repeat(8, 1).astype(np.uint8)  # survive a JPEG


def exif_of(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "maker"
    return exif.tobytes()


def with_orientation(kind, pixels, orientation):
    """A file in which the pixels lie as they are given, with an EXIF orientation."""
    image, exif = Image.fromarray(np.ascontiguousarray(pixels)), exif_of(orientation)
    if kind.startswith("PNG"):
        extra = [(b"eXIf", exif.removeprefix(b"Exif\0\0"))]
        return png(pixels, RGB, 8, **{kind.removeprefix("PNG ").removesuffix(" pixels"): extra})
    if kind.startswith("TIFF"):
        compression = {"TIFF": None, "TIFF deflate": "tiff_adobe_deflate"}[kind]
        return saved(image, "TIFF", compression=compression, tiffinfo={ExifTags.Base.Orientation.value: orientation})
    options = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }
    return saved(image, kind, exif=exif, **options[kind])


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG before pixels", "PNG after pixels", "TIFF", "TIFF deflate", "WEBP", "AVIF"]
)
def test_images_are_turned_upright(kind, orientation):
    picture = read(with_orientation(kind, STORED[orientation](BLOCKS), orientation))
    assert picture.pixels.shape == (3, 16, 24)
    assert np.abs(last(picture.pixels).astype(int) - BLOCKS).max() <= (8 if kind in ("JPEG", "AVIF") else 0)
    turned_by_pil = kind.startswith("TIFF")
    assert picture.remarks == ({TURNED: ""} if orientation > 1 and not turned_by_pil else {})


@pytest.mark.parametrize("orientation", [0, 9, 1000])
def test_an_orientation_that_is_none_leaves_an_image_as_it_is(orientation):
    picture = read(with_orientation("PNG before pixels", BLOCKS, orientation))
    assert np.array_equal(last(picture.pixels), BLOCKS)
    assert picture.remarks == {}


def test_images_are_turned_before_they_are_cut_to_size():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255  # the middle square
    assert read(with_orientation("PNG before pixels", pixels, 6), size=(32, 16)).pixels.shape == (3, 32, 16)
    upright = read(saved(Image.fromarray(np.rot90(pixels, -1).copy()), "PNG"), size=(32, 16))
    assert np.array_equal(read(with_orientation("PNG before pixels", pixels, 6), size=(32, 16)).pixels, upright.pixels)


def test_turned_images_may_be_transparent_too():
    rgba = random_values(8, 4).astype(np.uint8)
    content = png(rgba, RGB_ALPHA, 8, [(b"eXIf", exif_of(8).removeprefix(b"Exif\0\0"))])
    picture = read(content, background=3)
    assert np.array_equal(last(picture.pixels), np.rot90(blended(rgba[..., :3], rgba[..., 3:] / 255, 3)))
    assert picture.remarks == {TRANSPARENT: "", TURNED: ""}


def test_damaged_exif_data_never_loses_an_image():
    """Either it can still be read which way is up, or the image stays as it lies; the pixels are never damaged."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make], exif[ExifTags.Base.XResolution] = "maker", 72.0
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.SubjectLocation] = (50, 1)
    whole = exif.tobytes()
    generator = random.Random(0)
    outcomes = set()
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(generator.choice([1, 1, 4])):
            damaged[generator.randrange(6, len(damaged))] = generator.randrange(256)
        content = saved(Image.fromarray(BLOCKS), "PNG").replace(
            b"\0\0\0\0IEND", chunk(b"eXIf", bytes(damaged[6:])) + b"\0\0\0\0IEND"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = read(content)
        candidates = {name: stored(BLOCKS) for name, stored in STORED.items()}
        assert any(np.array_equal(last(picture.pixels), pixels) for pixels in candidates.values())
        outcomes.add((DOUBTFUL in picture.remarks, TURNED in picture.remarks))
    assert outcomes == {(False, True), (False, False), (True, False)}


# Depth and colour


@pytest.mark.parametrize("colour", [GRAY, RGB])
def test_png_files_of_every_depth(colour):
    for depth in DEPTHS[colour]:
        values = random_values(depth, CHANNELS[colour])
        expected = np.rint(values * 255 / (2**depth - 1)) if depth < 16 or colour == GRAY else values >> 8
        assert np.array_equal(last(read(png(values, colour, depth)).pixels), expected), depth


def test_all_levels_of_16_bits_are_scaled_and_rounded():
    values = np.arange(1 << 16).reshape(256, 256, 1)
    expected = np.rint(values / 257)
    assert np.array_equal(last(read(png(values, GRAY, 16)).pixels), expected)
    for order in "<>":
        assert np.array_equal(last(read(tiff(values[..., 0], 16, order)).pixels), expected)


@pytest.mark.parametrize("depth", [1, 4, 8, 12, 16])
@pytest.mark.parametrize("photometric", [0, 1])
def test_gray_tiff_files_of_every_depth_and_either_sense(depth, photometric):
    values = random_values(depth, 1)[..., 0]
    white = 2**depth - 1
    if (depth, photometric) == (12, 0):
        with pytest.raises(OSError, match="cannot identify"):  # PIL does not know it
            read(tiff(values, depth, PhotometricInterpretation=0))
        return
    expected = np.rint((values if photometric else white - values) * 255 / white)
    assert np.array_equal(read(tiff(values, depth, PhotometricInterpretation=photometric)).pixels[0], expected)


@pytest.mark.parametrize("white", [1, 15, 255, 1000, 65535])
def test_gray_pnm_files_of_every_white(white):
    values = np.random.default_rng(0).integers(0, white + 1, (9, 11))
    header = f"P5 11 9 {white}\n".encode()
    picture = read(header + values.astype(">u2" if white > 255 else ">u1").tobytes())
    np.testing.assert_allclose(picture.pixels[0], values * 255 / white, atol=0.51)  # PIL rounds once more


@pytest.mark.parametrize(
    "content",
    [
        saved(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"),
        saved(Image.fromarray(np.full((4, 4), 100, np.int32)), "TIFF"),
        saved(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"),
        saved(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "PPM"),
        tiff(np.full((4, 4), 1000), 16, SampleFormat=2),
        tiff(np.full((4, 4), 100), 8, SampleFormat=2),
    ],
    ids=["I large", "I small", "F", "PFM", "signed 16", "signed 8"],
)
def test_values_without_a_known_white_are_refused(content):
    with pytest.raises(ValueError, match=r"which of its values \(PIL's mode .*\) is white is not known: convert it"):
        read(content)


PATCHES = {"red": (0, 255, 255, 0), "green": (255, 0, 255, 0), "white": (0, 0, 0, 0), "black": (0, 0, 0, 255)}  # CMYK
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "white": (255, 255, 255), "black": (0, 0, 0)}


@pytest.mark.parametrize("name", PATCHES)
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "TIFF lzw"])
def test_cmyk_is_converted(kind, name):
    image = Image.new("CMYK", (8, 8), PATCHES[name])
    options = {"JPEG": {"quality": 100}, "TIFF": {}, "TIFF lzw": {"compression": "tiff_lzw"}}[kind]
    content = saved(image, kind.removesuffix(" lzw"), **options)
    assert (b"Adobe" in content) == (kind == "JPEG")  # which writes its inks inverted
    picture = read(content)
    assert np.abs(last(picture.pixels).astype(int) - COLOURS[name]).max() <= 3


def test_cmyk_jpeg_files_that_do_not_say_what_no_ink_is_are_refused():
    content = saved(Image.new("CMYK", (8, 8), PATCHES["red"]), "JPEG")
    at = content.index(b"\xff\xee")
    (length,) = struct.unpack(">H", content[at + 2 : at + 4])
    with pytest.raises(ValueError, match="CMYK without Adobe's marker"):
        read(content[:at] + content[at + 2 + length :])


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
def test_ycbcr_tiff_files_are_converted(compression):
    smooth = Image.fromarray(BLOCKS)
    picture = read(saved(smooth.convert("YCbCr"), "TIFF", compression=compression))
    assert np.abs(last(picture.pixels).astype(int) - BLOCKS).max() <= (40 if compression == "jpeg" else 4)


def test_lab_tiff_files_are_converted():
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
    content = saved(ImageCms.applyTransform(Image.fromarray(BLOCKS), transform), "TIFF")
    assert np.abs(last(read(content).pixels).astype(int) - BLOCKS).max() <= 8
    assert read(content, channels=1).pixels.shape == (1, 16, 24)


@pytest.mark.parametrize("kind", ["BMP", "TGA", "SGI", "PCX", "PPM", "DDS", "QOI", "JPEG2000", "IM", "DIB"])
def test_kinds_that_pil_reads_keep_their_pixels(kind):
    rgb = random_rgb(16, 16)
    options = {"JPEG2000": {"irreversible": False}}.get(kind, {})
    if kind == "QOI":  # each pixel in full
        pixels = b"".join(b"\xfe" + bytes(pixel) for pixel in rgb.reshape(-1, 3))
        content = b"qoif" + struct.pack(">II", 16, 16) + b"\x03\x00" + pixels + bytes(7) + b"\x01"
    else:
        content = saved(Image.fromarray(rgb), kind, **options)
    assert np.array_equal(last(read(content).pixels), rgb)


# Several frames


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_several_frames_the_first_one_is_taken(kind):
    first, second = (Image.fromarray(BLOCKS[::step].copy()) for step in (1, -1))
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(kind, {})
    picture = read(saved(first, kind, save_all=True, append_images=[second], **options))
    assert np.abs(last(picture.pixels).astype(int) - BLOCKS).max() <= (8 if kind == "AVIF" else 0)
    assert picture.remarks == {FRAMES: ""}


def test_a_preview_in_a_photograph_is_no_animation():
    first, second = (Image.fromarray(BLOCKS[::step].copy()) for step in (1, -1))
    picture = read(saved(first, "MPO", save_all=True, append_images=[second], quality=100, subsampling=0))
    assert np.abs(last(picture.pixels).astype(int) - BLOCKS).max() <= 8
    assert picture.remarks == {}


def test_what_is_no_picture_is_not_opened_whatever_it_is_called():
    """PIL would let another program draw PostScript."""
    with pytest.raises(OSError, match="cannot identify"):
        read(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n%%EOF\n")
