"""Prepared files."""

import json

import h5py
import numpy as np
import pytest

from pipeline.core.errors import DataError
from pipeline.images.prepared import content_digest, read_prepared, write_prepared
from tests.support.files import flip_bit, on_full_disk, relabelled, tiny_splits, truncate


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
    images, labels, names = split[:3]
    digests = {
        content_digest([images], (1, 8, 8), labels, names),
        content_digest([255 - images], (1, 8, 8), labels, names),
        content_digest([images], (1, 8, 8), labels[::-1], names),
        content_digest([images], (1, 8, 8), labels, names[::-1]),
        content_digest([images], (1, 4, 16), labels, names),
    }
    assert len(digests) == 5
    assert split.digest in digests
    assert content_digest([images[:5], images[5:]], (1, 8, 8), labels, names) == split.digest


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
        position = file["image"].id.get_offset()
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
    split = tiny_splits()["test"]
    split.labels[3] = label
    write_prepared(written, relabelled(split, split.labels))
    with pytest.raises(DataError, match=f"{written}: label {label} of row 3 is outside the 4 classes"):
        read_prepared(written)


def test_a_split_may_be_empty(tmp_path):
    split = tiny_splits()["test"]
    empty = relabelled(split._replace(images=split.images[:0]), split.labels[:0])
    write_prepared(tmp_path / "validation.h5", empty)
    read = read_prepared(tmp_path / "validation.h5")
    assert read.view_shape == (1, 8, 8)
    assert len(read.labels) == len(read.images) == 0


def test_images_stay_in_the_file_and_changes_to_them_out_of_it(written):
    read = read_prepared(written)
    before = written.read_bytes()
    read.images[0] = 255 - read.images[0]
    assert written.read_bytes() == before
    written.unlink()  # as DVC does before a stage runs
    assert np.array_equal(read.images[1:], tiny_splits()["test"].images[1:])


def test_plain_h5py_reads_the_images(written):
    with h5py.File(written) as file:
        assert np.array_equal(file["image"][:], tiny_splits()["test"].images)
        assert file["image"].chunks is None


def test_a_full_disk_is_an_error_that_leaves_the_old_file(written):
    before = written.read_bytes()
    split = tiny_splits()["train"]
    error = on_full_disk(lambda: write_prepared(written, split), 70_000)
    assert f"{written}: no space to write it" in str(error)
    assert written.read_bytes() == before
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_thinned_keeps_every_nth_image_and_its_label():
    train = tiny_splits()["train"]
    thin = train.thinned(20)
    assert np.array_equal(thin.images, train.images[::3])
    assert np.array_equal(thin.labels, train.labels[::3])
    assert len(train.thinned(1000).labels) == len(train.labels)
