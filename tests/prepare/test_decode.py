"""Splits, decoding and statistics."""

import io
import re
import shutil
import time
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import ExifTags, Image

from pipeline.core.errors import DataError
from pipeline.images.prepared import read_prepared
from pipeline.prepare.datasets import Part, RawDataset, open_dataset
from pipeline.prepare.decode import _Decoder, prepare
from pipeline.prepare.picture import picture_of
from pipeline.prepare.splits import channel_statistics, split, split_by_class
from tests.support.files import CLASS_NAMES, finish, run_stage, start_stage, tiny_images, write_params
from tests.support.helpers import dataset_parameters, real_data


def labels_of(counts, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def part_of(images, labels, name="image {}"):
    """A part from arrays (N, C, H, W) of one or three channels."""
    pixels = images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)
    return Part(labels, lambda row: Image.fromarray(np.ascontiguousarray(pixels[row])), name.format)


def source_of(images, labels, class_names=CLASS_NAMES, **others):
    parts = {name: part_of(*arrays) for name, arrays in others.items()}
    return RawDataset(class_names, {"train": part_of(images, labels)} | parts)


def prepared(tmp_path, source, threads=2, **changes):
    """What was written, and the splits."""
    written = prepare(source, dataset_parameters(**changes), tmp_path, threads)
    assert sorted(path.name for path in tmp_path.glob("*")) == ["test.h5", "train.h5", "validation.h5"]
    return written, {name: read_prepared(tmp_path / f"{name}.h5") for name in ("train", "validation", "test")}


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_split_takes_the_same_fraction_of_every_class(fraction):
    counts = (40, 20, 100)
    labels = labels_of(counts)
    rest, taken = split_by_class(labels, fraction, seed=0)
    assert list(np.bincount(labels[taken])) == [round(fraction * count) for count in counts]
    assert list(np.bincount(labels[rest])) == [count - round(fraction * count) for count in counts]


def test_split_parts_are_sorted_disjoint_and_complete():
    rest, taken = split_by_class(labels_of((13, 7, 31)), 0.3, seed=1)
    assert list(rest) == sorted(set(rest))
    assert list(taken) == sorted(set(taken))
    assert sorted([*rest, *taken]) == list(range(51))


def test_split_follows_from_its_seed():
    labels = labels_of((30, 30))
    first, again, other = (split_by_class(labels, 0.5, seed)[1] for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_digits_are_split_into_all_of_their_images(tmp_path):
    with open_dataset(dataset_parameters(), tmp_path) as source:
        written, splits = prepared(tmp_path, source)
        original = np.array([np.asarray(source.parts["train"].image(row)) for row in range(1797)])
    assert written.counts == {"train": 1010, "validation": 337, "test": 450}
    assert written.image_shape == (1, 8, 8)
    rows = np.concatenate([split.images.reshape(-1, 64) for split in splits.values()])
    assert np.array_equal(np.sort(rows.view("V64").ravel()), np.sort(original.reshape(-1, 64).view("V64").ravel()))
    for split_ in splits.values():
        expected = np.bincount(source.parts["train"].labels) / 1797
        np.testing.assert_allclose(np.bincount(split_.labels) / len(split_.labels), expected, atol=0.003)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 6, 4), (3, 64, 64)])
def test_images_and_labels_come_out_in_order(tmp_path, shape, threads):
    train, validation, test = (tiny_images(rows, shape=shape, seed=rows) for rows in (200, 65, 7))
    _, splits = prepared(tmp_path, source_of(*train, validation=validation, test=test), threads)
    for (images, labels), split_ in zip((train, validation, test), splits.values(), strict=True):
        assert np.array_equal(split_.images, images)
        assert np.array_equal(split_.labels, labels)
        assert split_.class_names == CLASS_NAMES


def test_images_of_several_blocks_are_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.images.prepared.BLOCK_BYTES", 1000)
    images, labels = tiny_images(300)
    _, splits = prepared(tmp_path, source_of(images, labels, test=(images, labels)), validation_fraction=0.0)
    assert np.array_equal(splits["train"].images, images)
    assert len(splits["validation"].labels) == 0


def test_statistics_come_from_the_training_split_alone(tmp_path):
    _, splits = prepared(tmp_path, source_of(*tiny_images(shape=(3, 5, 4))))
    pixels = splits["train"].images.astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1) / 255
    for split_ in splits.values():
        np.testing.assert_allclose(split_.mean, pixels.mean(1), rtol=1e-12)
        np.testing.assert_allclose(split_.std, pixels.std(1), rtol=1e-12)


def test_statistics_do_not_depend_on_the_blocks():
    images, _ = tiny_images(shape=(3, 8, 8))
    whole = channel_statistics([images])
    assert whole == channel_statistics(images[start : start + 7] for start in range(0, 120, 7))


def test_a_constant_channel_has_a_deviation_above_zero():
    images = np.full((10, 2, 4, 4), 7, np.uint8)
    images[:, 0] = np.arange(10)[:, None, None]
    mean, std = channel_statistics([images])
    assert std[1] == pytest.approx(1 / 255)
    assert mean[1] == pytest.approx(7 / 255)
    assert std[0] == pytest.approx(np.arange(10).std() / 255)


def test_another_seed_gives_other_splits():
    source = source_of(*tiny_images())
    first, again, other = (split(source, dataset_parameters(seed=seed)) for seed in (0, 0, 1))
    for name in ("train", "validation", "test"):
        names = [[part[name].name(row) for row in range(len(part[name].labels))] for part in (first, again, other)]
        assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("count", [20, 40, 119, 1000])
def test_train_images_are_limited_evenly_by_class_and_the_test_part_is_not(count):
    images, labels = tiny_images()
    source = source_of(images, labels, test=(images, labels))
    parts = split(source, dataset_parameters(train_images=count, validation_fraction=0.0))
    counts = np.bincount(parts["train"].labels)
    assert counts.sum() == min(count, 120)
    assert np.ptp(counts) <= 1
    assert len(parts["test"].labels) == 120


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_outside_the_classes_are_refused_by_row(label):
    images, labels = tiny_images()
    labels[17] = label
    with pytest.raises(DataError, match=f"label {label} of row 17 is outside the 4 classes"):
        split(source_of(images, labels), dataset_parameters())


def test_one_class_is_refused():
    with pytest.raises(DataError, match="has 1 class, at least 2 are needed"):
        split(source_of(*tiny_images(classes=1), class_names=("bird",)), dataset_parameters())


def test_a_class_without_training_images_is_refused_by_name():
    images, labels = tiny_images()
    with pytest.raises(DataError, match="no image of class 'frog' is left in the train split"):
        split(source_of(images[labels != 3], labels[labels != 3]), dataset_parameters())


@pytest.mark.parametrize(
    ("rows", "test_fraction", "validation_fraction", "empty"),
    [(8, 0.1, 0.5, "test"), (8, 0.5, 0.1, "validation"), (8, 0.5, 0.9, "train"), (0, 0.5, 0.5, "train")],
)
def test_a_split_without_images_is_refused_by_name(rows, test_fraction, validation_fraction, empty):
    dataset = dataset_parameters(test_fraction=test_fraction, validation_fraction=validation_fraction)
    with pytest.raises(DataError, match=f"the {empty} split is empty: \\d+ images are too few"):
        split(source_of(*tiny_images(rows)), dataset)


def folder_of(directory, images):
    """An imagefolder of (class, file name, image or bytes)."""
    for label, name, image in images:
        path = directory / "images" / label / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image) if isinstance(image, bytes) else image.save(path)
    return directory / "images"


def random_image(mode="RGB", size=(8, 6), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def jpeg(image):
    content = io.BytesIO()
    image.save(content, "JPEG")
    return content.getvalue()


def prepared_folder(tmp_path, images, **changes):
    return prepared_path(tmp_path, folder_of(tmp_path, images), **changes)


def prepared_path(tmp_path, path, **changes):
    out = tmp_path / "prepared"
    out.mkdir()
    dataset = dataset_parameters(name="imagefolder", path=str(path), validation_fraction=0.0, **changes)
    with open_dataset(dataset, out) as source:
        written = prepare(source, dataset, out)
    return written, {path.stem: read_prepared(path) for path in out.glob("*.h5")}


def good_images(count=8):
    return [(label, f"{row}.png", random_image(seed=row)) for label in ("a", "b") for row in range(count)]


DAMAGED = {
    "text": b"this is no image",
    "empty": b"",
    "cut": jpeg(random_image())[:-20],
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_image_is_named(tmp_path, damage):
    images = [*good_images(), ("b", "broken.jpg", DAMAGED[damage])]
    with pytest.raises(DataError, match=r"images: b/broken.jpg: cannot be read: .*--skip-bad"):
        prepared_folder(tmp_path, images)


def test_a_pointer_of_git_lfs_is_named_with_how_to_fetch_the_image(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    with pytest.raises(DataError, match=r"images: b/0\.png: cannot be read: a pointer of Git LFS.*: git lfs pull"):
        prepared_folder(tmp_path, [*good_images(), ("b", "0.png", pointer)])


def test_damaged_images_are_skipped_and_counted_when_asked(tmp_path):
    bad = [("a", "0broken.jpg", DAMAGED["text"]), ("b", "broken.jpg", DAMAGED["cut"])]
    written, splits = prepared_folder(tmp_path, [*good_images(), *bad], skip_bad=True)
    assert {problem.split(":")[1].strip() for problem in written.bad} == {"a/0broken.jpg", "b/broken.jpg"}
    assert sum(written.counts.values()) == 16
    assert sum(len(split_.labels) for split_ in splits.values()) == 16
    for split_ in splits.values():
        for image, label in zip(split_.images, split_.labels, strict=True):
            matches = [
                row
                for row in range(8)
                if np.array_equal(image, picture_of(random_image(seed=row), None, None, 255).pixels)
            ]
            assert len(matches) == 1, label


def test_a_class_whose_images_are_all_damaged_is_refused(tmp_path):
    bad = [("c", f"{row}.jpg", b"") for row in range(8)]
    with pytest.raises(DataError, match="no image of class 'c' is left"):
        prepared_folder(tmp_path, [*good_images(), *bad], skip_bad=True)


def test_images_of_different_sizes_are_refused_with_the_way_to_resize(tmp_path):
    images = [*good_images(), ("b", "large.png", random_image(size=(20, 30)))]
    with pytest.raises(DataError, match=r"b/large.png: is 30x20, the first image is 6x8: set dataset.image_size"):
        prepared_folder(tmp_path, images)


def test_images_of_different_channels_are_refused_with_the_way_to_convert(tmp_path):
    images = [*good_images(), ("b", "gray.png", random_image("L"))]
    with pytest.raises(DataError, match=r"b/gray.png: has 1 channels, the first image has 3: set dataset.channels"):
        prepared_folder(tmp_path, images)


@pytest.mark.parametrize(("channels", "size"), [(1, (5, 9)), (3, (9, 5)), (3, (224, 224))])
def test_images_of_all_kinds_are_resized_and_converted(tmp_path, channels, size):
    modes = ["RGB", "L", "RGBA", "P", "CMYK", "LA", "1", "RGB"]
    images = [
        (label, f"{row}.tif", random_image(mode, (10 + row, 20 - row), row))
        for label in ("a", "b")
        for row, mode in enumerate(modes)
        if mode not in ("CMYK", "LA") or label == "a"
    ]
    written, splits = prepared_folder(tmp_path, images, channels=channels, image_size=size)
    assert written.image_shape == (channels, *size)
    assert sum(len(split_.labels) for split_ in splits.values()) == len(images)


def test_resizing_keeps_the_aspect_ratio_and_the_middle():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255  # the middle square
    assert picture_of(Image.fromarray(pixels), (16, 16), None, 255).pixels[..., 1:-1].min() == 255
    assert picture_of(Image.fromarray(pixels), (40, 80), None, 255).pixels.mean() == pixels.mean()


def test_a_test_part_of_damaged_images_is_refused(tmp_path):
    images = [(f"train/{label}", name, image) for label, name, image in good_images()]
    bad = [("test/a", f"{row}.png", b"") for row in range(3)]
    with pytest.raises(DataError, match="no image of the test split can be read"):
        prepared_folder(tmp_path, [*images, *bad], skip_bad=True)


def oriented(pixels, orientation):
    """A PNG file whose pixels lie as they are given."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(content, "PNG", exif=exif)
    return content.getvalue()


@pytest.mark.parametrize("form", ["folder", "tar", "gztar", "zip"])
def test_images_have_one_shape_once_they_are_turned(tmp_path, form):
    upright = [np.asarray(random_image(size=(12, 20), seed=row)) for row in range(8)]
    images = [
        *(("a", f"{row}.png", oriented(pixels, 1)) for row, pixels in enumerate(upright)),
        *(("b", f"{row}.png", oriented(np.rot90(pixels, 1), 6)) for row, pixels in enumerate(upright)),
    ]
    path = folder_of(tmp_path, images)
    if form != "folder":
        path = shutil.make_archive(str(tmp_path / "packed"), form, path)
    written, splits = prepared_path(tmp_path, path)
    assert written.image_shape == (3, 20, 12)
    (note,) = written.notes
    words = "images turned upright, as their EXIF orientation says: 8, the first is "
    assert re.fullmatch(rf"{words}{path}: b/\d.png", note)
    for label in (0, 1):
        pixels = np.concatenate([split_.images[split_.labels == label] for split_ in splits.values()])
        assert sorted(map(bytes, pixels)) == sorted(each.transpose(2, 0, 1).tobytes() for each in upright)


def icon(transparency, seed=0):
    """A black icon all of whose content is in its transparency, as a palette image or with an alpha channel."""
    shape = np.random.default_rng(seed).integers(0, 2, (6, 8), np.uint8)
    if transparency == "alpha":
        return Image.fromarray(np.stack([0 * shape, 255 * shape], 2))
    image = Image.fromarray(shape)
    image.putpalette([0, 0, 0] * 2)
    image.info["transparency"] = 0 if transparency == "index" else bytes([0, 128])
    return image


@pytest.mark.parametrize("background", [255, 100])
@pytest.mark.parametrize("transparency", ["alpha", "index", "levels"])
def test_icons_are_laid_over_the_background_and_counted(tmp_path, recwarn, transparency, background):
    images = [(label, f"{row}.png", icon(transparency, row)) for label in ("a", "b") for row in range(8)]
    written, splits = prepared_folder(tmp_path, images, channels=1, background=background)
    assert written.notes == [
        f"images with transparent pixels, laid over gray level {background} (dataset.background): 16, the first is "
        f"{tmp_path}/images: a/0.png"
    ]
    dark = round(background * 127 / 255) if transparency == "levels" else 0
    assert set(np.unique(splits["train"].images)) == {dark, background}
    assert not recwarn.list


def test_what_pil_warns_of_is_told_in_lines_of_our_own(tmp_path, monkeypatch, recwarn):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a maker with a long name"
    content = io.BytesIO()
    random_image(seed=9).save(content, "JPEG", exif=exif.tobytes()[:-9])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # of 48; at 80, PIL refuses an image
    images = [*good_images(), ("b", "9.jpg", content.getvalue())]
    written, _ = prepared_folder(tmp_path, images)
    (note,) = written.notes
    assert re.fullmatch(
        r"images that are read, but perhaps not as they were meant: 1, the first is .*b/9.jpg: .*Truncated File Read",
        note,
    )
    assert not recwarn.list
    with pytest.warns(UserWarning, match="after"):  # warnings are heard as before
        warnings.warn("after", stacklevel=1)


def test_what_others_warn_of_meanwhile_is_heard(tmp_path):
    images, labels = tiny_images()
    source = source_of(images, labels)

    class Bar:
        def update(self, _):
            warnings.warn("from elsewhere", stacklevel=1)

    decoder = _Decoder(dataset_parameters(), 2)
    with pytest.warns(UserWarning, match="from elsewhere"), open(tmp_path / "pixels", "wb") as pixels:
        decoder.decode("train", source.parts["train"], pixels, Bar())
    assert list(decoder.notes()) == []


def test_of_moving_images_the_first_frame_is_taken_and_told(tmp_path):
    frames = [random_image(seed=row).convert("P") for row in (20, 21)]
    moving = io.BytesIO()
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    written, _ = prepared_folder(tmp_path, [*good_images(), ("b", "9.gif", moving.getvalue())])
    assert written.notes == [
        "images of several frames or pages, of which the first one is taken: 1, the first is "
        f"{tmp_path}/images: b/9.gif"
    ]


def test_an_error_names_no_address(tmp_path):
    with pytest.raises(DataError) as caught:
        prepared_folder(tmp_path, [*good_images(), ("b", "broken.jpg", DAMAGED["text"])])
    assert "0x" not in str(caught.value)
    assert "it is damaged, no image, or of a kind that is not read here" in str(caught.value)


def test_splits_of_equal_images_are_warned_of(tmp_path):
    images, labels = tiny_images()
    same = np.broadcast_to(images[:1], images.shape)
    written, _ = prepared(tmp_path, source_of(images, labels, test=(same, labels)))
    assert written.warnings == ["all 120 images of the test split are equal: no class can be told from another"]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 1, 2)])
def test_splits_of_images_of_one_colour_each_are_warned_of(tmp_path, shape):
    images, labels = tiny_images(shape=(shape[0], 1, 1))
    flat = np.broadcast_to(images, (120, *shape))
    others, _ = tiny_images(shape=shape)
    written, _ = prepared(tmp_path, source_of(flat, labels, test=(others, labels)))
    assert written.warnings == [
        "each image of the train split (88) is of one colour all over",
        "each image of the validation split (32) is of one colour all over",
    ]


def test_one_different_image_is_enough(tmp_path):
    images = np.zeros((120, 1, 8, 8), np.uint8)
    images[-1, 0, 3, 3] = 1
    labels = labels_of((60, 60))
    split_ = (images, labels)
    written, _ = prepared(tmp_path, source_of(*split_, ("a", "b"), test=split_, validation=split_))
    assert written.warnings == []


def test_a_single_image_is_no_split_of_equal_images(tmp_path):
    images, labels = tiny_images()
    written, _ = prepared(tmp_path, source_of(images, labels, test=(images[:1], labels[:1])))
    assert written.warnings == []


def test_images_of_a_single_pixel_may_be_of_one_colour(tmp_path):
    written, _ = prepared(tmp_path, source_of(*tiny_images(shape=(3, 1, 1))))
    assert written.warnings == []


FOLDER = {
    "dataset.name": "imagefolder",
    "dataset.path": "images",
    "dataset.test_fraction": 0.25,
    "dataset.validation_fraction": 0.25,
}


@pytest.mark.parametrize("classes", [2, 10, 11, 30])
def test_the_last_lines_name_the_classes_with_their_counts(tmp_path, monkeypatch, classes):
    monkeypatch.chdir(tmp_path)
    images = [(f"c{name:02}", f"{row}.png", b"") for name in range(classes) for row in range(4 + name)]
    flat = io.BytesIO()
    Image.new("L", (4, 4), 9).save(flat, "PNG")
    folder_of(tmp_path, [(label, name, flat.getvalue()) for label, name, _ in images])
    write_params(tmp_path / "params.yaml", FOLDER)
    result = run_stage("prepare")
    assert result.exit_code == 0, result.stderr
    listed, wrote = result.stdout.splitlines()
    named = ", ".join(f"c{name:02} ({4 + name})" for name in range(min(10, classes)))
    more = {2: "", 10: "", 11: " and 1 more (14 to 14 each)", 30: " and 20 more (14 to 33 each)"}[classes]
    assert listed == f"classes, with their images in all splits: {named}{more}"
    assert wrote.startswith(f"wrote data/prepared: imagefolder, {classes} classes, 4x4, gray")
    warned = [line for line in result.stderr.splitlines() if line.startswith("warning: all ")]
    assert [re.search(r"the (\w+) split", line)[1] for line in warned] == ["train", "validation", "test"]


def test_a_thousand_classes(tmp_path):
    images, labels = tiny_images(4000, classes=1000, shape=(1, 4, 4))
    names = tuple(f"class {number:04}" for number in range(1000))
    written, splits = prepared(tmp_path, source_of(images, labels, names))
    assert len(written.class_names) == 1000
    assert [len(split_.labels) for split_ in splits.values()] == [2000, 1000, 1000]


def test_files_are_the_same_bytes_every_time(tmp_path):
    for name in ("first", "again"):
        (tmp_path / name).mkdir()
        prepared(tmp_path / name, source_of(*tiny_images()), threads=1 if name == "first" else 4)
    for name in ("train", "validation", "test"):
        first, again = ((tmp_path / run / f"{name}.h5").read_bytes() for run in ("first", "again"))
        assert first == again


def test_images_are_one_piece_that_h5py_reads(tmp_path):
    prepared(tmp_path, source_of(*tiny_images()))
    with h5py.File(tmp_path / "train.h5") as file:
        assert file["image"].chunks is None
        assert file["image"][:].shape == (64, 1, 8, 8)


@pytest.mark.real
def test_60000_jpeg_files_take_little_memory_and_a_published_teacher_knows_them(tmp_path):
    images, weights = real_data("cifar10-jpeg.tar.gz"), real_data("heo2019-resnet26-cifar10.safetensors")
    given = {
        "dataset.name": "imagefolder",
        "dataset.path": str(images),
        "dataset.test_fraction": 0.1,
        "dataset.validation_fraction": 0.1,
        "teacher.network": "resnet26",
        "teacher.weights": str(weights),
        "teacher.mean": [0.4914, 0.4822, 0.4465],
        "teacher.std": [0.2023, 0.1994, 0.2010],
    }
    write_params(tmp_path / "params.yaml", given)
    started, peak = time.monotonic(), 0
    process = start_stage(tmp_path, "prepare")
    while process.poll() is None:  # the kernel's own maximum of a child counts the parent's memory before the start
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        peak = int(found[1]) / 1024 if found else peak
        time.sleep(0.05)
    seconds = time.monotonic() - started
    code, stdout, stderr = finish(process)
    assert code == 0, stderr
    assert "32x32, RGB, images: train 45,000, validation 5,000, test 10,000" in stdout
    print(f"\n60,000 JPEG files in {seconds:.1f} s, {peak:.0f} MiB resident at most")
    assert peak < 1000
    write_params(tmp_path / "params.yaml", given | {"dataset.train_images": 2000})
    assert finish(start_stage(tmp_path, "prepare"))[0] == 0
    code, stdout, stderr = finish(start_stage(tmp_path, "teacher"))
    assert code == 0, stderr
    assert float(re.search(r"train accuracy ([\d.]+)%", stdout)[1]) > 84
