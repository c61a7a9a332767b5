"""Splits and prepared files."""

import json

import h5py
import numpy as np
import pytest

from pipeline.data import Images, content_digest, load_digits, prepare, read_prepared, split_by_class, write_prepared
from pipeline.errors import DataError
from tests.files import CLASS_NAMES, flip_bit, tiny_images, tiny_splits, truncate


def labels_of(counts, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


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


@pytest.fixture(scope="module")
def digits():
    data, names = load_digits()
    return data, names, prepare(data, names, test_fraction=0.25, validation_fraction=0.25, seed=0)


def test_digits_are_as_scikit_learn_has_them(digits):
    from sklearn.datasets import load_digits as load

    data, names, _ = digits
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == np.uint8
    assert data.labels.dtype == np.int64
    assert names == tuple("0123456789")
    original = load()
    np.testing.assert_allclose(data.images[:, 0] / 255, original.images / 16, atol=0.5 / 255 + 1e-12)
    assert np.array_equal(data.labels, original.target)


def test_prepare_splits_digits_into_all_of_its_images(digits):
    data, _, splits = digits
    assert {name: len(split.labels) for name, split in splits.items()} == {
        "train": 1010,
        "validation": 337,
        "test": 450,
    }
    rows = np.concatenate([split.images.reshape(-1, 64) for split in splits.values()])
    assert np.array_equal(np.sort(rows.view("V64").ravel()), np.sort(data.images.reshape(-1, 64).view("V64").ravel()))
    for split in splits.values():
        expected = np.bincount(data.labels) / len(data.labels)
        np.testing.assert_allclose(np.bincount(split.labels) / len(split.labels), expected, atol=0.003)


def test_statistics_come_from_the_training_split_alone():
    splits = prepare(tiny_images(shape=(3, 5, 4)), CLASS_NAMES, 0.25, 0.25, seed=0)
    pixels = splits["train"].images.astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1) / 255
    for split in splits.values():
        np.testing.assert_allclose(split.mean, pixels.mean(1), rtol=1e-12)
        np.testing.assert_allclose(split.std, pixels.std(1), rtol=1e-12)
        assert split.image_shape == (3, 5, 4)


def test_a_constant_channel_has_a_deviation_above_zero():
    data = tiny_images(shape=(2, 4, 4))
    data.images[:, 1] = 7
    train = prepare(data, CLASS_NAMES, 0.25, 0.25, seed=0)["train"]
    assert train.std[1] == pytest.approx(1 / 255)
    assert train.mean[1] == pytest.approx(7 / 255)


def test_another_seed_gives_other_splits():
    first, again, other = (prepare(tiny_images(), CLASS_NAMES, 0.25, 0.25, seed) for seed in (0, 0, 1))
    assert [split.digest for split in first.values()] == [split.digest for split in again.values()]
    assert first["test"].digest != other["test"].digest
    assert first["train"].digest != other["train"].digest


def test_read_after_write_is_the_identity(tmp_path):
    for name, split in tiny_splits().items():
        write_prepared(tmp_path / f"{name}.h5", split)
        read = read_prepared(tmp_path / f"{name}.h5")
        assert read.images.dtype == np.uint8
        assert read.labels.dtype == np.int64
        assert np.array_equal(read.images, split.images)
        assert np.array_equal(read.labels, split.labels)
        assert read[2:] == split[2:]


def test_digest_follows_from_the_content_and_not_from_the_file(tmp_path):
    split = tiny_splits()["test"]
    write_prepared(tmp_path / "a/test.h5", split)
    write_prepared(tmp_path / "b.h5", split)
    assert read_prepared(tmp_path / "a/test.h5").digest == read_prepared(tmp_path / "b.h5").digest
    digests = {
        content_digest(split.images, split.labels, split.class_names),
        content_digest(255 - split.images, split.labels, split.class_names),
        content_digest(split.images, split.labels[::-1], split.class_names),
        content_digest(split.images, split.labels, split.class_names[::-1]),
        content_digest(split.images.reshape(32, 1, 4, 16), split.labels, split.class_names),
    }
    assert len(digests) == 5
    assert split.digest in digests


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "test.h5"
    write_prepared(path, tiny_splits()["test"])
    return path


def change_attribute(path, name, value):
    with h5py.File(path, "r+") as file:
        file.attrs[name] = value


def replace_by_group(path):
    with h5py.File(path, "r+") as file:
        del file["image"]
        file.create_group("image")


def remove(path, name):
    with h5py.File(path, "r+") as file:
        del file[name]


def flip_bit_of_an_image(path):
    with h5py.File(path, "r") as file:
        position = file["image"].id.get_chunk_info(0).byte_offset
    flip_bit(path, position + 100)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: truncate(path),
    "bit of an image flipped": flip_bit_of_an_image,
    "no HDF5": lambda path: path.write_text("image,label\n"),
    "without labels": lambda path: remove(path, "label"),
    "a group in place of images": replace_by_group,
    "attribute is no text": lambda path: change_attribute(path, "mean", np.zeros(3)),
    "attribute is no JSON": lambda path: change_attribute(path, "mean", "[0.5"),
    "attribute is another type": lambda path: change_attribute(path, "mean", "0.5"),
    "another mean": lambda path: change_attribute(path, "mean", "[0.5]"),
    "another digest": lambda path: change_attribute(path, "digest", json.dumps("0" * 64)),
    "other class names": lambda path: change_attribute(path, "class_names", json.dumps(["a", "b", "c", "d"])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_with_the_way_to_make_it_again(written, damage):
    DAMAGES[damage](written)
    with pytest.raises(DataError) as caught:
        read_prepared(written)
    message = str(caught.value)
    assert message.startswith(f"{written}: ")
    assert "python -m stages.prepare" in message
    assert "\n" not in message


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_outside_the_classes_are_refused_by_row(written, label):
    data = tiny_images()
    data.labels[17] = label
    with pytest.raises(DataError, match=f"label {label} of row 17 is outside the 4 classes"):
        prepare(data, CLASS_NAMES, 0.25, 0.25, seed=0)
    split = tiny_splits()["test"]
    split.labels[3] = label
    digest = content_digest(split.images, split.labels, split.class_names)
    write_prepared(written, split._replace(digest=digest))
    with pytest.raises(DataError, match=f"{written}: label {label} of row 3 is outside the 4 classes"):
        read_prepared(written)


def test_one_class_is_refused():
    with pytest.raises(DataError, match="has 1 class, at least 2 are needed"):
        prepare(tiny_images(classes=1), ("bird",), 0.25, 0.25, seed=0)


@pytest.mark.parametrize(
    ("rows", "test_fraction", "validation_fraction", "empty"),
    [(8, 0.1, 0.5, "test"), (8, 0.5, 0.1, "validation"), (8, 0.5, 0.9, "train"), (0, 0.5, 0.5, "train")],
)
def test_a_split_without_images_is_refused_by_name(rows, test_fraction, validation_fraction, empty):
    with pytest.raises(DataError, match=f"the {empty} split is empty: {rows} images are too few"):
        prepare(tiny_images(rows), CLASS_NAMES, test_fraction, validation_fraction, seed=0)


def test_thinned_keeps_every_nth_image_and_its_label():
    train = tiny_splits()["train"]
    thin = train.thinned(20)
    assert np.array_equal(thin.images, train.images[::3])
    assert np.array_equal(thin.labels, train.labels[::3])
    assert len(train.thinned(1000).labels) == len(train.labels)


def test_images_and_labels_of_the_source_stay_as_they_were():
    data = tiny_images()
    before = Images(data.images.copy(), data.labels.copy())
    prepare(data, CLASS_NAMES, 0.25, 0.25, seed=0)
    assert np.array_equal(data.images, before.images)
    assert np.array_equal(data.labels, before.labels)
