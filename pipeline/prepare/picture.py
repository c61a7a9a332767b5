"""From an opened image file to bytes: upright, opaque, gray or RGB, of 8 bits a channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from pipeline.core.text import one_line
from pipeline.images.prepared import Images

GRAY_MODES = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N", "I")
COLOUR_MODES = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB")

# What undoes each EXIF orientation. ImageOps.exif_transpose writes the EXIF data anew, too, and fails if it is damaged.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

STILL = ("MPO", "PSD")  # formats whose further frames are previews, other views or layers, and no animation
PNG_RGB_16, PNG_GRAY_ALPHA_16 = "RGB;16B", "LA;16B"  # the latter is in mode RGBA
PNG_LEVELS = {"L;2": 85, "L;4": 17}  # PIL scales the pixels of such PNG files by so much, but not the transparent one
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO, SIGNED = 0, (2,)

TRANSPARENT, FRAMES, TURNED, DOUBTFUL = "transparent", "frames", "turned", "doubtful"


class Picture(NamedTuple):
    """An image as it is prepared, and what a user should know of how it came to that."""

    pixels: Images
    """(C, H, W)."""
    remarks: dict[str, str]
    """TRANSPARENT: it is in places; FRAMES: there are more; TURNED: by its EXIF orientation; DOUBTFUL: why."""


def picture_of(image: Image.Image, size: tuple[int, int] | None, channels: int | None, background: int) -> Picture:
    """Return an image as it is prepared.

    It is turned as its EXIF orientation says. Gray of 16 bits is scaled to 8 and rounded; of colours of 16 bits, PIL
    keeps the upper 8. Of several frames or pages, the first one is taken.

    Args:
        image: as it was opened.
        size: (height, width) to scale it to, its aspect ratio kept: the middle is cut out.
        channels: 1 for gray, 3 for RGB; by default, what the image has.
        background: gray level, 0 to 255, behind transparent pixels.

    Raises:
        ValueError: the image has values of which nobody says which one is white, or a transparent colour of 16 bits.
        Exception: whatever PIL raises on damaged images.
    """
    remarks = {}
    if image.format not in STILL and getattr(image, "is_animated", False):
        remarks[FRAMES] = ""
    coding = _coding(image)
    _check(image, coding)
    if coding in PNG_LEVELS and "transparency" in image.info:
        image.info["transparency"] *= PNG_LEVELS[coding]
    image.load()
    gray = image.mode in GRAY_MODES or coding == PNG_GRAY_ALPHA_16
    plain = _in_8_bits(image, gray)
    if plain.mode in ("LA", "RGBA"):
        plain, transparent = _laid_over(plain, background)
        if transparent:
            remarks[TRANSPARENT] = ""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # PIL raises all kinds on damaged EXIF data
        orientation = None
        remarks[DOUBTFUL] = f"its EXIF data cannot be read ({one_line(error)})"
    if orientation in UPRIGHT:
        plain = plain.transpose(UPRIGHT[orientation])
        remarks[TURNED] = ""
    gray = gray if channels is None else channels == 1
    plain = plain.convert("L" if gray else "RGB")
    if size is not None and size != (plain.height, plain.width):
        plain = ImageOps.fit(plain, size[::-1], Image.Resampling.BILINEAR)
    array = np.asarray(plain)
    return Picture(np.ascontiguousarray(array[None] if gray else array.transpose(2, 0, 1)), remarks)


def _check(image: Image.Image, coding: str) -> None:
    """Refuse what cannot be brought to 8 bits without a guess, before its pixels are decoded."""
    is_known = image.mode in GRAY_MODES + COLOUR_MODES and (image.mode != "I" or image.format in ("PNG", "PPM"))
    if not is_known or _tags(image).get(TIFF_SAMPLE_FORMAT) == SIGNED:
        raise ValueError(f"which of its values (PIL's mode {image.mode}) is white is not known: convert it to 8 bits")
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        raise ValueError("CMYK without Adobe's marker, which says whether 0 or 255 is no ink: convert it to RGB")
    if coding == PNG_RGB_16 and "transparency" in image.info:
        raise ValueError("a transparent colour of 16 bits a channel: convert it to 8 bits, or to an alpha channel")


def _coding(image: Image.Image) -> str:
    """Return how the pixels of a PNG file that is not yet loaded are stored, in PIL's words; of others nothing."""
    tile: Any = getattr(image, "tile", None)
    return str(tile[0][3]) if tile and image.format == "PNG" else ""


def _tags(image: Image.Image) -> Mapping[int, Any]:
    """Return the tags of a TIFF file, none of others."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    return tags


def _in_8_bits(image: Image.Image, gray: bool) -> Image.Image:
    """Return an image in mode L or RGB, or LA or RGBA if it may be transparent."""
    if image.mode.startswith("I"):
        return _scaled(image)
    transparent = image.has_transparency_data
    if gray:
        return image.convert("LA" if transparent else "L")
    return image.convert("RGBA" if transparent else "RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """Return a gray image of up to 16 bits in mode L or LA: its white becomes 255, values are rounded."""
    values = np.asarray(image).astype(np.int64)
    white = 2 ** _tags(image).get(TIFF_BITS, (16,))[0] - 1
    if values.min() < 0 or values.max() > white:
        raise ValueError(f"values from {values.min()} to {values.max()}, expected 0 to {white}: convert it to 8 bits")
    levels = (white - values) if _tags(image).get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO else values
    gray = Image.fromarray(((levels * 255 + white // 2) // white).astype(np.uint8))
    key = image.info.get("transparency")
    if key is None:
        return gray
    return Image.merge("LA", (gray, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))))


def _laid_over(image: Image.Image, background: int) -> tuple[Image.Image, bool]:
    """Return an image of mode LA or RGBA without its last channel, and whether that made a difference."""
    pixels: NDArray[np.uint16] = np.asarray(image).astype(np.uint16)
    colour, alpha = pixels[..., :-1], pixels[..., -1:]
    blended = (colour * alpha + background * (255 - alpha) + 127) // 255  # at most 65,152
    opaque = blended.astype(np.uint8)
    return Image.fromarray(opaque[..., 0] if image.mode == "LA" else opaque), bool((alpha < 255).any())
