"""Shards: writing, reading, making, publishing, checking and adopting them."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from pipeline.attack.columns import Block
from pipeline.core.errors import ParameterError, ShardError
from pipeline.core.files import file_digest
from pipeline.core.status import Status
from pipeline.core.store import Store
from pipeline.images.views import apply_views
from pipeline.networks.weights import save_weights
from pipeline.publish.adopt import adopt_shards
from pipeline.publish.writer import write_shard
from pipeline.shards.check import find_problems
from pipeline.shards.file import read_columns
from pipeline.shards.format import columns_of, shard_name
from pipeline.shards.manifest import read_manifest
from pipeline.shards.order import shards_by_view
from pipeline.shards.reader import BoundaryShards
from pipeline.shards.stream import StreamedShards
from tests.support.files import (
    ROOT,
    change_manifest,
    contents,
    flip_bit,
    make_missing,
    mislabelled,
    relabelled,
    reseal,
    sample_dataset,
    tiny_splits,
    tiny_teacher,
    truncate,
)

ATTRIBUTES = {"fingerprint": "0" * 64, "view": 2, "block": 7}


def random_columns(seed, rows, columns):
    """Arbitrary bits in every column, so also infinities and NaN."""
    generator = np.random.default_rng(seed)
    return {
        name: np.frombuffer(
            generator.bytes(rows * int(np.prod(column.shape)) * np.dtype(column.dtype).itemsize), column.dtype
        ).reshape(rows, *column.shape)
        for name, column in columns.items()
    }


@settings(derandomize=True, max_examples=30, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 40),
    channels=st.sampled_from([1, 3]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    classes=st.integers(2, 12),
    targets=st.integers(0, 3),
    logits=st.sampled_from(["float32", "float16"]),
    embed_images=st.booleans(),
    compression=st.sampled_from(["none", "gzip"]),
)
def test_reading_after_writing_is_the_identity(
    seed, rows, channels, size, classes, targets, logits, embed_images, compression
):
    columns = columns_of((channels, *size), classes, targets, embed_images, logits=logits)
    values = random_columns(seed, rows, columns)
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "deep/first.h5", Path(folder) / "second.h5"
        for path in (first, second):
            write_shard(path, values, columns, **ATTRIBUTES, compression=compression)
        assert first.read_bytes() == second.read_bytes()
        read = read_columns(first, columns)
        with h5py.File(first, "r") as file:
            assert set(file) == set(columns)
            for name, column in columns.items():
                assert file[name].dtype == np.dtype(column.dtype)
                assert file[name][:].tobytes() == values[name].tobytes(), name
            attributes = {name: file.attrs[name] for name in ATTRIBUTES}
            assert attributes == ATTRIBUTES | {"fingerprint": ATTRIBUTES["fingerprint"].encode()}
            assert file.attrs["format_version"] == (1 if targets and logits == "float32" else 2)
    assert read.keys() == columns.keys()
    assert read["index"].dtype == np.int64
    for name in columns:
        assert np.array_equal(read[name].astype(values[name].dtype).view("u1"), values[name].view("u1")), name


BAD_VALUES = {
    "dtype": lambda values: values | {"label": values["label"].astype(np.int32)},
    "shape of a row": lambda values: values | {"delta": values["delta"][:, :1]},
    "rows": lambda values: values | {"status": values["status"][1:]},
    "missing": lambda values: {name: value for name, value in values.items() if name != "margin"},
    "unknown": lambda values: values | {"logits": values["teacher_logits"]},
}


@pytest.mark.parametrize("change", BAD_VALUES)
def test_values_that_do_not_fit_the_columns_are_not_written(tmp_path, change):
    columns = columns_of((1, 4, 4), 3, 2, True)
    values = BAD_VALUES[change](random_columns(0, 5, columns))
    with pytest.raises(ValueError, match="column"):
        write_shard(tmp_path / "shard.h5", values, columns, **ATTRIBUTES, compression="none")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def train():
    """64 images; the teacher gets the first five wrong."""
    return mislabelled(tiny_splits()["train"])


@pytest.fixture(scope="module")
def made(tmp_path_factory, train):
    """A finished dataset of 2 views and 2 targets, published."""
    directory = tmp_path_factory.mktemp("made")
    dataset = sample_dataset(directory, train, {"attack.targets": 2})
    make_missing(dataset, directory)
    dataset.publish(directory / "bss")
    return directory


@pytest.fixture
def copy(tmp_path, made):
    """A copy that a test may spoil: store, teacher.safetensors and the published directory."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def columns(made):
    """All columns of all shards, by view: (views, rows, ...)."""
    shards = BoundaryShards(made / "bss")
    views = [
        [
            read_columns(made / "bss" / shard.name, shards.manifest.columns)
            for shard in shards_by_view(shards.manifest)[view]
        ]
        for view in range(2)
    ]
    return {
        name: np.stack([np.concatenate([shard[name] for shard in view]) for view in views])
        for name in shards.manifest.columns
    }


def test_columns_are_as_documented(made):
    documented = {
        "index": (np.uint32, ()),
        "label": (np.int64, ()),
        "image": (np.uint8, (1, 8, 8)),
        "crop": (np.int16, (2,)),
        "flip": (np.uint8, ()),
        "teacher_logits": (np.float32, (4,)),
        "target": (np.int16, (2,)),
        "delta": (np.int8, (2, 1, 8, 8)),
        "delta_scale": (np.float32, (2,)),
        "boundary_logits": (np.float32, (2, 4)),
        "margin": (np.float32, (2,)),
        "distance": (np.float32, (2,)),
        "status": (np.uint8, (2,)),
        "evaluations": (np.uint16, (2,)),
    }
    for block, rows in enumerate([24, 24, 16]):
        with h5py.File(made / "bss" / shard_name(1, block)) as file:
            assert {name: (file[name].dtype, file[name].shape) for name in file} == {
                name: (np.dtype(dtype), (rows, *shape)) for name, (dtype, shape) in documented.items()
            }


def test_rows_are_the_training_split_in_order(columns, train):
    for view in range(2):
        assert np.array_equal(columns["index"][view], np.arange(64))
        assert np.array_equal(columns["label"][view], train.labels)


def test_images_are_regenerated_from_crop_and_flip(columns, train):
    for view in range(2):
        crop, flip = (torch.from_numpy(columns[name][view]) for name in ("crop", "flip"))
        images = apply_views(torch.from_numpy(train.images), crop, flip, torch.empty(64, 0), padding=1, size=(8, 8))
        assert np.array_equal(images.numpy(), columns["image"][view])
    assert set(np.unique(columns["crop"])) == {0, 1, 2}
    assert set(np.unique(columns["flip"])) == {0, 1}
    assert not np.array_equal(columns["image"][0], columns["image"][1])


def test_rows_that_the_teacher_gets_wrong_are_empty(columns):
    correct = columns["teacher_logits"].argmax(-1) == columns["label"]
    wrong = columns["status"] == Status.BASE_MISCLASSIFIED
    assert np.array_equal(wrong, np.broadcast_to(~correct[..., None], wrong.shape))
    assert wrong[:, :5].all()
    assert 0 < wrong.mean() < 0.5
    assert (columns["target"][wrong] == -1).all()
    for name in ("delta", "delta_scale", "margin", "distance", "evaluations"):
        assert not columns[name][wrong].any(), name
    repeated = np.broadcast_to(columns["teacher_logits"][:, :, None], columns["boundary_logits"].shape)
    assert np.array_equal(columns["boundary_logits"][wrong], repeated[wrong])


def test_targets_are_distinct_classes_other_than_the_label(columns):
    searched = columns["status"][..., 0] != Status.BASE_MISCLASSIFIED
    target, label = columns["target"][searched], columns["label"][searched]
    assert target.min() >= 0
    assert target.max() <= 3
    assert (target != label[:, None]).all()
    assert (target[:, 0] != target[:, 1]).all()


def test_samples_are_where_their_columns_say(columns):
    searched = columns["status"] != Status.BASE_MISCLASSIFIED
    perturbation = columns["delta"] * columns["delta_scale"][..., None, None, None].astype(np.float64)
    distance = np.sqrt((perturbation[searched] ** 2).sum((1, 2, 3)))
    np.testing.assert_allclose(columns["distance"][searched], distance, rtol=1e-5)
    images = np.broadcast_to(columns["image"][:, :, None] / 255, perturbation.shape)
    samples = torch.from_numpy((images + perturbation)[searched]).float()
    logits = tiny_teacher()(samples).numpy()
    np.testing.assert_allclose(columns["boundary_logits"][searched], logits, rtol=0, atol=1e-4)

    label = np.broadcast_to(columns["label"][..., None], searched.shape)[searched]
    target = columns["target"][searched]
    recorded = columns["boundary_logits"][searched]
    rows = np.arange(len(label))
    np.testing.assert_allclose(columns["margin"][searched], recorded[rows, label] - recorded[rows, target], atol=1e-6)


def test_converged_samples_are_on_the_boundary_of_the_two_top_classes(columns):
    converged = columns["status"] == Status.CONVERGED
    assert converged.sum() > 100
    assert (np.tanh(np.abs(columns["margin"][converged]) / 2) <= 0.02).all()
    assert (columns["distance"][converged] > 0).all()
    assert (columns["evaluations"][converged] >= 1).all()
    label = np.broadcast_to(columns["label"][..., None], converged.shape)[converged]
    pair = np.sort(np.stack([label, columns["target"][converged]], 1), 1)
    top = np.sort(columns["boundary_logits"][converged].argsort(1)[:, -2:], 1)
    assert np.array_equal(top, pair)


def test_the_manifest_sums_up_the_shards(made, columns):
    manifest = read_manifest(made / "bss")
    assert [shard.name for shard in manifest.shards] == [shard_name(v, b) for v in range(2) for b in range(3)]
    assert manifest.totals.rows == 128
    assert manifest.totals.samples == 256
    assert sum(manifest.totals.statuses.values()) == 256
    for status in Status:
        assert manifest.totals.statuses[status.name.lower()] == (columns["status"] == status).sum()
    for shard in manifest.shards:
        assert shard.bytes == (made / "bss" / shard.name).stat().st_size
        assert shard.sha256 == file_digest(made / "bss" / shard.name)
    assert manifest.digests.teacher == file_digest(made / "teacher.safetensors")
    assert find_problems(made / "bss", manifest) == []


def published(directory):
    return {path.name: path.read_bytes() for path in (directory / "bss").iterdir()}


def test_the_same_inputs_give_the_same_bytes(tmp_path, made, train):
    shutil.copy(made / "teacher.safetensors", tmp_path)
    dataset = dataset_in(tmp_path, train)
    assert [block.rows for block in make_missing(dataset, tmp_path)] == [24, 24, 16] * 2
    dataset.publish(tmp_path / "bss")
    assert published(tmp_path) == published(made)


def test_references_that_somebody_holds_to_hdf5_objects_change_no_bytes(tmp_path, made, train, monkeypatch):
    held = []
    create = h5py.Group.create_dataset

    def create_and_hold(*arguments, **options):  # as a profiler does that looks at the stack at any moment
        held.append(create(*arguments, **options))
        return held[-1]

    monkeypatch.setattr(h5py.Group, "create_dataset", create_and_hold)
    shutil.copy(made / "teacher.safetensors", tmp_path)
    dataset = dataset_in(tmp_path, train)
    make_missing(dataset, tmp_path)
    assert held
    dataset.publish(tmp_path / "bss")
    assert published(tmp_path) == published(made)


def dataset_in(directory, train, changes=None):
    """The dataset of `made`, with changes, in a directory that has the teacher."""
    return sample_dataset(directory, train, {"attack.targets": 2} | (changes or {}))


def test_more_views_make_only_the_new_ones(copy, train):
    before = published(copy)
    dataset = dataset_in(copy, train, {"attack.views": 3})
    assert [(block.view, block.number) for block in make_missing(dataset, copy)] == [(2, 0), (2, 1), (2, 2)]
    dataset.publish(copy / "bss")
    after = published(copy)
    assert len(after) == 12
    assert {name: after[name] for name in before if name.endswith(".h5")} == {
        name: content for name, content in before.items() if name.endswith(".h5")
    }


def test_fewer_views_make_nothing_and_publish_fewer(copy, train):
    dataset = dataset_in(copy, train, {"attack.views": 1})
    assert make_missing(dataset, copy) == []
    (copy / "bss/view-099-block-00000.h5").write_bytes(b"stale")
    dataset.publish(copy / "bss")
    assert sorted(published(copy)) == [
        *("README.md", "croissant.json", "manifest.json"),
        *(shard_name(0, block) for block in range(3)),
    ]
    assert find_problems(copy / "bss", read_manifest(copy / "bss")) == []


def test_a_draw_of_views_does_not_depend_on_the_size_of_shards(tmp_path, columns, train, made):
    shutil.copy(made / "teacher.safetensors", tmp_path)
    dataset = dataset_in(tmp_path, train, {"attack.rows_per_shard": 50})
    make_missing(dataset, tmp_path)
    dataset.publish(tmp_path / "bss")
    shards = BoundaryShards(tmp_path / "bss")
    for name in ("image", "crop", "flip", "target", "label", "index"):
        read = [shards.read(shard, [name])[name] for shard in shards_by_view(shards.manifest)[1]]
        assert np.array_equal(np.concatenate(read), columns[name][1]), name


def fingerprint_with(directory, train, changes=None):
    return dataset_in(directory, train, changes).fingerprint


def test_the_number_of_views_does_not_change_the_fingerprint(made, train):
    assert fingerprint_with(made, train, {"attack.views": 5}) == fingerprint_with(made, train)


CHANGES = {
    "attack.seed": 6,
    "search.tolerance": 0.03,
    "search.name": "heo2019",
    "attack.targets": 1,
    "search.max_gradients": 5,
    "attack.rows_per_shard": 25,
    "attack.embed_images": False,
    "attack.compression": "gzip",
    "views.padding": 2,
    "views.flip": False,
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_parameter_that_decides_the_content_changes_the_fingerprint(made, train, key):
    assert fingerprint_with(made, train, {key: CHANGES[key]}) != fingerprint_with(made, train)


def test_another_teacher_and_other_data_change_the_fingerprint(copy, made, train):
    before = fingerprint_with(made, train)
    assert fingerprint_with(copy, train) == before
    assert fingerprint_with(copy, tiny_splits()["train"]) != before
    teacher = tiny_teacher()
    teacher.network.linear.bias[0] += 1e-6
    save_weights(teacher, copy / "teacher.safetensors")
    assert fingerprint_with(copy, train) != before


STORE_DAMAGES = {
    "bit flipped": lambda path: flip_bit(path, path.stat().st_size // 2),
    "truncated": truncate,
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("damage", STORE_DAMAGES)
def test_a_damaged_shard_of_the_store_is_made_again_alone(copy, train, damage):
    dataset = dataset_in(copy, train)
    before = published(copy)
    damaged = Block(1, 1, 24, 24)
    STORE_DAMAGES[damage](dataset.store.path(dataset.stored_name(damaged)))
    assert make_missing(dataset, copy) == [damaged]
    dataset.publish(copy / "bss")
    assert published(copy) == before


def stored_beside_published(dataset, directory):
    """(path in the store, path in the directory) of every shard."""
    paths = [dataset.store.path(dataset.stored_name(block)) for block in dataset.blocks]
    return [(path, directory / path.name) for path in paths]


@pytest.fixture
def linked(tmp_path, made, train):
    """A folder with a finished dataset, whose published shards are the stored ones."""
    shutil.copy(made / "teacher.safetensors", tmp_path)
    dataset = dataset_in(tmp_path, train)
    make_missing(dataset, tmp_path)
    dataset.publish(tmp_path / "bss")
    return tmp_path


def test_published_shards_are_the_stored_files(linked, train):
    dataset = dataset_in(linked, train)
    assert all(stored.samefile(published) for stored, published in stored_beside_published(dataset, linked / "bss"))


def test_what_was_published_is_found_and_published_again_without_being_read(linked, train, monkeypatch):
    dataset = dataset_in(linked, train)
    before = published(linked)
    for module, function in (("pipeline.core.store", "file_digest"), ("pipeline.attack.dataset", "read_columns")):
        monkeypatch.setattr(f"{module}.{function}", lambda *arguments: pytest.fail("was read"))
    assert dataset.unsure() == dataset.missing() == []
    dataset.publish(linked / "bss")
    assert published(linked) == before


@pytest.mark.parametrize("change", ["edited", "edited, then read-only", "cut", "written over"])
def test_a_shard_that_is_changed_in_its_published_place_is_made_again_alone(linked, train, change):
    dataset = dataset_in(linked, train)
    before, path = published(linked), linked / "bss" / NAME
    if change == "cut":
        truncate(path)
    elif change == "written over":
        shutil.copy(linked / "bss" / shard_name(0, 0), path)
    else:
        flip_bit(path, path.stat().st_size // 2)
        path.chmod(0o444 if "read-only" in change else 0o644)
    (block,) = [block for block in dataset.blocks if shard_name(block.view, block.number) == NAME]
    assert dataset.unsure() == [block]
    assert make_missing(dataset, linked) == [block]
    dataset.publish(linked / "bss")
    assert published(linked) == before


def test_what_others_still_read_is_not_changed_when_a_shard_is_made_again(linked, train):
    dataset = dataset_in(linked, train)
    path = linked / "bss" / NAME
    flip_bit(path, 3000)
    edited = path.read_bytes()
    with open(path, "rb") as reader:
        make_missing(dataset, linked)
        dataset.publish(linked / "bss")
        assert reader.read() == edited
    assert path.read_bytes() != edited


def test_a_store_that_was_moved_is_digested_once_and_kept(copy, train, monkeypatch):
    dataset = dataset_in(copy, train)
    for block in dataset.blocks:
        dataset.store.path(dataset.stored_name(block)).touch()
    assert dataset.unsure() == dataset.blocks
    assert dataset.missing() == []
    monkeypatch.setattr("pipeline.core.store.file_digest", lambda path: pytest.fail("was read"))
    assert dataset.missing() == []
    dataset.publish(copy / "bss")


def test_a_store_of_digests_alone_is_kept(copy, train):
    dataset, before = dataset_in(copy, train), published(copy)
    for block in dataset.blocks:
        path = dataset.store.path(dataset.stored_name(block))
        path.with_name(path.name + ".sha256").write_text(file_digest(path))
    assert dataset.missing() == []
    dataset.publish(copy / "bss")
    assert published(copy) == before


def test_a_shard_of_another_dataset_with_its_record_is_made_again(linked, train):
    dataset = dataset_in(linked, train)
    other = dataset_in(linked, train, {"attack.seed": 6})
    make_missing(other, linked)
    (dataset.store.root / dataset.fingerprint).rename(linked / "aside")
    (dataset.store.root / other.fingerprint).rename(dataset.store.root / dataset.fingerprint)
    assert dataset.missing() == dataset.blocks


def test_where_nothing_can_be_linked_shards_are_copied(linked, train, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EXDEV, "another device")

    dataset, before = dataset_in(linked, train), published(linked)
    monkeypatch.setattr(os, "link", refuse)
    dataset.publish(linked / "bss")
    assert published(linked) == before
    assert not any(stored.samefile(shard) for stored, shard in stored_beside_published(dataset, linked / "bss"))


def test_publishing_without_a_shard_keeps_what_is_published(copy, train):
    dataset = dataset_in(copy, train)
    before = contents(copy / "bss")
    dataset.store.path(dataset.stored_name(Block(0, 2, 48, 16))).unlink()
    with pytest.raises(ShardError, match=r"view-000-block-00002\.h5: missing"):
        dataset.publish(copy / "bss")
    assert contents(copy / "bss") == before
    assert sorted(path.name for path in copy.iterdir()) == ["bss", "store", "teacher.safetensors"]


def test_prune_removes_the_shards_of_other_parameters(copy, train):
    other = dataset_in(copy, train, {"attack.seed": 6, "attack.views": 1})
    make_missing(other, copy)
    fewer = dataset_in(copy, train, {"attack.views": 1})
    assert fewer.prune() == 6
    assert fewer.missing() == []
    assert len(other.missing()) == 3


@pytest.mark.parametrize("targets", [4, 5])
def test_as_many_targets_as_classes_are_refused(tmp_path, train, targets):
    with pytest.raises(ParameterError, match=f"attack.targets: expected at most 3, .*got {targets}"):
        sample_dataset(tmp_path, train, {"attack.targets": targets})


def test_a_teacher_that_is_always_wrong_gives_a_valid_dataset_without_samples(tmp_path):
    split = tiny_splits()["train"]
    predicted = tiny_teacher()(torch.from_numpy(split.images).float() / 255).argmax(1).numpy()
    train = relabelled(split, (predicted + 1) % 4)
    dataset = sample_dataset(tmp_path, train, {"views.padding": 0, "views.flip": False})
    make_missing(dataset, tmp_path)
    manifest = dataset.publish(tmp_path / "bss")
    assert manifest.totals.statuses == {
        "converged": 0,
        "base_misclassified": 128,
        "not_converged": 0,
        "third_class": 0,
        "bad_gradient": 0,
    }
    assert len(BoundaryShards(tmp_path / "bss")) == 128


def test_a_row_on_which_two_classes_tie_is_recorded_like_any_other(tmp_path):
    """Class 1 differs from class 0 by less than float32 can tell: margin 0, gradient not."""
    teacher = tiny_teacher()
    with torch.no_grad():
        weight, bias = teacher.network.linear.weight, teacher.network.linear.bias
        weight[0, 0] = 0
        weight[1] = weight[0]
        weight[1, 0] = 1e-12
        bias[1] = bias[0]
        bias[:2] += 50
    split = tiny_splits()["train"]
    train = relabelled(split, np.zeros_like(split.labels))
    dataset = sample_dataset(tmp_path, train, {"attack.views": 1}, teacher=teacher)
    make_missing(dataset, tmp_path)
    dataset.publish(tmp_path / "bss")
    for block in range(3):
        columns = read_columns(tmp_path / "bss" / shard_name(0, block), dataset.columns)
        wrong = columns["status"] == Status.BASE_MISCLASSIFIED
        assert np.array_equal(columns["target"] == -1, wrong)
        assert not columns["margin"][wrong].any()
        repeated = columns["teacher_logits"][:, None]
        assert np.array_equal(columns["boundary_logits"][wrong], repeated[wrong])


def manifest_refusal(directory):
    with pytest.raises(ShardError) as caught:
        read_manifest(directory)
    message = str(caught.value)
    assert message.startswith(f"{directory / 'manifest.json'}: ")
    assert "\n" not in message
    return message


def test_a_missing_manifest_is_named(tmp_path):
    assert "cannot be read (No such file or directory)" in manifest_refusal(tmp_path)


NO_JSON = {
    "empty": b"",
    "cut": b"{",
    "binary": b"\xff\xfe",
    "deep": b"[" * 1000,
    **{name: f'{{"format_version": 1, "mean": [{name}]}}'.encode() for name in ("NaN", "Infinity", "-Infinity")},
}


@pytest.mark.parametrize("case", NO_JSON)
def test_a_manifest_that_is_no_json_is_refused(copy, case):
    (copy / "bss/manifest.json").write_bytes(NO_JSON[case])
    assert "not valid JSON" in manifest_refusal(copy / "bss")


def edit_shard(index, **changes):
    return lambda values: values["shards"][index].update(changes)


def drop_column(values):
    del values["columns"]["margin"]


MANIFESTS = {
    "list": (lambda values: None, "format version None"),
    "version": (
        lambda values: values.update(format_version=3),
        "format version 3, this software reads versions up to 2",
    ),
    "no version": (lambda values: values.pop("format_version"), "format version None"),
    "unknown key": (lambda values: values.update(comment="mine"), "comment: Extra inputs are not permitted"),
    "unknown key of a shard": (edit_shard(0, url="http://example.org"), "shards.0.url: Extra inputs"),
    "missing key": (lambda values: values.pop("digests"), "digests: Field required"),
    "name outside": (edit_shard(0, name="../view-000-block-00000.h5"), "shards.0.name: String should match"),
    "absolute name": (edit_shard(0, name="/etc/passwd"), "shards.0.name: String should match"),
    "name of another block": (edit_shard(0, name="view-000-block-00001.h5"), "name does not say its view and block"),
    "digest": (edit_shard(0, sha256="00"), "shards.0.sha256: String should match"),
    "fingerprint outside": (lambda values: values.update(fingerprint="../" * 20), "fingerprint: String should match"),
    "no bytes": (edit_shard(0, bytes=0), "shards.0.bytes: Input should be greater than or equal to 1"),
    "rows of a shard": (edit_shard(0, rows=23), "the blocks of view 0 do not add up to 64 rows"),
    "missing shard": (lambda values: values["shards"].pop(), "the shards are not 2 views of 2 blocks each"),
    "shard twice": (lambda values: values["shards"].append(values["shards"][0]), "the shards are not 2 views"),
    "no shards": (lambda values: values.update(shards=[]), "2 views, but only 0 shards"),
    "more views": (lambda values: values.update(views=3), "the shards are not 3 views of 2 blocks each"),
    "totals": (lambda values: values["totals"].update(samples=1), "the totals are not the sums over the shards"),
    "statuses": (lambda values: values["totals"]["statuses"].update(converged=0), "the totals are not the sums"),
    "column": (drop_column, "the columns are not those of format version 1"),
    "dtype": (lambda values: values["columns"]["delta"].__setitem__(0, "object"), "the columns are not those of"),
    "image shape": (lambda values: values.update(image_shape=[1, 8, 9]), "the columns are not those of"),
    "deviation": (lambda values: values.update(std=[0.0]), "mean or deviation is out of range"),
    "channels": (lambda values: values.update(mean=[0.1, 0.2]), "image shape, mean and deviation do not fit"),
    "one class": (lambda values: values.update(class_names=["bird"]), "class_names: List should have at least 2 items"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_an_unsound_manifest_is_refused_by_name(copy, case):
    change, expected = MANIFESTS[case]
    change_manifest(copy / "bss", change)
    if case == "list":
        (copy / "bss/manifest.json").write_text("[]")
    assert expected in manifest_refusal(copy / "bss")


def test_a_manifest_of_endless_views_is_refused_at_once(copy):
    def change(values):
        values.update(shards=[], views=10_000_000)

    change_manifest(copy / "bss", change)
    start = time.process_time()
    manifest_refusal(copy / "bss")
    assert time.process_time() - start < 0.2


NAME = shard_name(1, 0)


def swap(name, make):
    """Replaces a column of a shard by something else."""

    def change(path):
        with h5py.File(path, "r+") as file:
            if name in file:
                del file[name]
            make(file, path)

    return change


def point_outside(file, path):
    file["label"] = h5py.ExternalLink(str(path.with_name(shard_name(0, 0))), "/label")


def store_outside(file, path):
    path.with_name("outside").write_bytes(np.arange(24).tobytes())
    file.create_dataset("label", (24,), np.int64, external=[(str(path.with_name("outside")), 0, 24 * 8)])


def assemble_virtually(file, path):
    layout = h5py.VirtualLayout((24,), np.int64)
    layout[:] = h5py.VirtualSource(str(path.with_name(shard_name(0, 0))), "label", (24,))
    file.create_virtual_dataset("label", layout)


CRAFTED = {
    "external link": (swap("label", point_outside), "column 'label' is a link to elsewhere"),
    "soft link": (
        swap("label", lambda file, path: file.__setitem__("label", h5py.SoftLink("/index"))),
        "column 'label' is a link to elsewhere",
    ),
    "external storage": (swap("label", store_outside), "column 'label' is no dataset of this file"),
    "virtual dataset": (swap("label", assemble_virtually), "column 'label' is no dataset of this file"),
    "group": (swap("label", lambda file, path: file.create_group("label")), "column 'label' is no dataset"),
    "dtype": (
        swap("label", lambda file, path: file.create_dataset("label", data=np.zeros(24, np.int32))),
        r"column 'label' is int32 (24,), expected int64 (24,)",
    ),
    "byte order": (
        swap("label", lambda file, path: file.create_dataset("label", data=np.zeros(24, ">i8"))),
        "column 'label' holds >i8 in an unusual form",
    ),
    "object dtype": (
        swap("label", lambda file, path: file.create_dataset("label", data=["x"] * 24)),
        "column 'label' does not hold plain numbers",
    ),
    "shape": (
        swap("label", lambda file, path: file.create_dataset("label", data=np.zeros((24, 2), np.int64))),
        r"column 'label' is int64 (24, 2), expected int64 (24,)",
    ),
    "extra column": (
        swap("extra", lambda file, path: file.create_dataset("extra", data=np.zeros(3))),
        "columns are not the manifest's: 'extra'",
    ),
    "missing column": (swap("label", lambda file, path: None), "columns are not the manifest's: 'label'"),
    "attribute": (
        swap("x", lambda file, path: file.attrs.__setitem__("view", 0)),
        "is another shard than it was ('view' is 0, expected 1)",
    ),
    "array as attribute": (
        swap("x", lambda file, path: file.attrs.__setitem__("view", np.ones(3))),
        "is another shard than it was ('view' is None, expected 1)",
    ),
    "no HDF5": (lambda path: path.write_bytes(b"text" * 500), "not a readable shard"),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_a_shard_with_the_right_digest_and_wrong_contents_is_named(copy, case):
    change, expected = CRAFTED[case]
    directory = copy / "bss"
    change(directory / NAME)
    reseal(directory, NAME)
    problems = find_problems(directory, read_manifest(directory))
    assert len(problems) == 1
    assert problems[0].startswith(f"{directory / NAME}: {expected}")
    with pytest.raises(ShardError, match=NAME):
        BoundaryShards(directory)


FILE_DAMAGES = {
    "truncated": (truncate, r"bytes, the manifest says"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"0"), r"bytes, the manifest says"),
    "bit flipped": (lambda path: flip_bit(path, 3000), "its sha256 is not the manifest's"),
    "missing": (Path.unlink, "missing"),
}


@pytest.mark.parametrize("case", FILE_DAMAGES)
def test_a_damaged_file_is_named(copy, case):
    damage, expected = FILE_DAMAGES[case]
    directory = copy / "bss"
    damage(directory / NAME)
    problems = find_problems(directory, read_manifest(directory))
    assert len(problems) == 1
    assert problems[0].startswith(f"{directory / NAME}: ")
    assert expected in problems[0]
    with pytest.raises(ShardError, match=expected):
        BoundaryShards(directory)


def test_a_file_that_the_manifest_does_not_list_is_named(copy):
    shutil.copy(copy / "bss" / NAME, copy / "bss/view-007-block-00000.h5")
    problems = find_problems(copy / "bss", read_manifest(copy / "bss"))
    assert problems == [f"{copy / 'bss/view-007-block-00000.h5'}: not in the manifest"]


def test_every_problem_is_told(copy):
    directory = copy / "bss"
    truncate(directory / shard_name(0, 0))
    flip_bit(directory / shard_name(0, 2), 3000)
    (directory / shard_name(1, 1)).unlink()
    problems = find_problems(directory, read_manifest(directory))
    assert [problem.split(": ")[0] for problem in problems] == [
        str(directory / shard_name(view, block)) for view, block in ((0, 0), (0, 2), (1, 1))
    ]


def test_adopted_shards_need_not_be_made(tmp_path, made, train):
    shutil.copy(made / "teacher.safetensors", tmp_path)
    dataset = dataset_in(tmp_path, train)
    manifest = read_manifest(made / "bss")
    assert len(dataset.missing()) == 6
    assert adopt_shards(made / "bss", manifest, dataset.store) == 6
    assert dataset.missing() == []
    assert all(stored.samefile(shard) for stored, shard in stored_beside_published(dataset, made / "bss"))
    assert adopt_shards(made / "bss", manifest, dataset.store) == 0
    dataset.publish(tmp_path / "bss")
    assert published(tmp_path) == published(made)


def test_a_damaged_directory_is_not_adopted(copy):
    flip_bit(copy / "bss" / NAME, 3000)
    store = Store(copy / "other")
    manifest = read_manifest(copy / "bss")
    with pytest.raises(ShardError, match=NAME):
        adopt_shards(copy / "bss", manifest, store)
    assert store.find(f"{manifest.fingerprint}/{NAME}") is None


def as_numpy(row):
    return {name: tensor.numpy() for name, tensor in row.items()}


def test_reader_gives_rows_by_view_then_index(made, columns):
    shards = BoundaryShards(made / "bss")
    assert len(shards) == 128
    for row in (0, 23, 24, 63, 64, 100, 127, np.int64(5)):
        item = as_numpy(shards[row])
        view, index = divmod(int(row), 64)
        assert item.keys() == columns.keys() | {"samples"}
        for name in columns:
            assert item[name].dtype == columns[name].dtype, name
            assert np.array_equal(item[name], columns[name][view, index]), name


def test_reader_counts_negative_rows_from_the_end(made):
    shards = BoundaryShards(made / "bss")
    for negative, positive in ((-1, 127), (-128, 0)):
        for name, value in shards[negative].items():
            assert torch.equal(value, shards[positive][name]), name


@pytest.mark.parametrize("row", [128, -129, 10_000])
def test_reader_refuses_rows_outside(made, row):
    with pytest.raises(IndexError, match=f"row {row} of 128"):
        BoundaryShards(made / "bss")[row]


def test_reader_can_be_iterated(made):
    assert [int(row["index"]) for row in BoundaryShards(made / "bss")] == [*range(64)] * 2


def test_samples_are_image_plus_scaled_delta(made):
    item = BoundaryShards(made / "bss")[40]
    expected = item["image"].numpy() / np.float32(255) + item["delta"].numpy() * item["delta_scale"].numpy().reshape(
        2, 1, 1, 1
    )
    assert item["samples"].dtype == torch.float32
    np.testing.assert_allclose(item["samples"].numpy(), expected, rtol=0, atol=1e-7)


def test_shards_without_images_have_all_other_columns_alike(tmp_path, made, columns, train):
    shutil.copy(made / "teacher.safetensors", tmp_path)
    dataset = dataset_in(tmp_path, train, {"attack.embed_images": False, "attack.views": 1})
    make_missing(dataset, tmp_path)
    dataset.publish(tmp_path / "bss")
    shards = BoundaryShards(tmp_path / "bss")
    item = as_numpy(shards[30])
    assert item.keys() == columns.keys() - {"image"}
    for name, value in item.items():
        assert np.array_equal(value, columns[name][0, 30]), name


@pytest.mark.parametrize("compression", ["gzip"])
def test_compression_changes_the_file_and_not_the_values(tmp_path, made, columns, train, compression):
    shutil.copy(made / "teacher.safetensors", tmp_path)
    dataset = dataset_in(tmp_path, train, {"attack.compression": compression, "attack.views": 1})
    make_missing(dataset, tmp_path)
    dataset.publish(tmp_path / "bss")
    for name, value in as_numpy(BoundaryShards(tmp_path / "bss")[50]).items():
        if name != "samples":
            assert np.array_equal(value, columns[name][0, 50]), name
    with h5py.File(tmp_path / "bss" / shard_name(0, 0)) as file:
        assert file["delta"].compression == compression


def test_reader_without_verification_still_refuses_what_is_no_shard(copy):
    (copy / "bss" / NAME).write_bytes(b"text")
    shards = BoundaryShards(copy / "bss", verify=False)
    assert int(shards[0]["index"]) == 0
    with pytest.raises(ShardError, match=NAME):
        shards[64]


@pytest.mark.parametrize("how", ["rows", "columns"])
def test_reader_is_not_deceived_by_a_dataset_that_takes_the_place_of_its_own(tmp_path, copy, train, how):
    def read(shards):
        return (
            shards[0]["delta"]
            if how == "rows"
            else shards.read(shards_by_view(shards.manifest)[0][0], ["delta"])["delta"]
        )

    checked, unchecked = BoundaryShards(copy / "bss"), BoundaryShards(copy / "bss", verify=False)
    before = read(BoundaryShards(copy / "bss"))
    (tmp_path / "other").mkdir()
    other = dataset_in(tmp_path / "other", train, {"attack.seed": 6})
    make_missing(other, tmp_path / "other")
    other.publish(copy / "bss")
    assert np.array_equal(read(checked), before)  # what it has checked, it keeps open
    with pytest.raises(ShardError, match=r"view-000-block-00000\.h5: is another shard than it was"):
        read(unchecked)


def test_reader_can_be_pickled_with_open_files(made):
    shards = BoundaryShards(made / "bss")
    first = shards[3]
    again = pickle.loads(pickle.dumps(shards))
    assert len(again) == len(shards)
    for name, value in again[3].items():
        assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_workers_of_a_loader_read_what_this_process_reads(made, columns, start):
    shards = BoundaryShards(made / "bss")
    assert int(shards[70]["index"]) == 6  # files that are open here do not disturb the workers
    loader = DataLoader(shards, batch_size=20, num_workers=2, multiprocessing_context=start)
    batches = list(loader)
    assert [len(batch["label"]) for batch in batches] == [20] * 6 + [8]
    for name, values in columns.items():
        read = torch.cat([batch[name] for batch in batches]).numpy()
        assert np.array_equal(read, values.reshape(-1, *values.shape[2:])), name
    assert torch.cat([batch["samples"] for batch in batches]).shape == (128, 2, 1, 8, 8)


def test_a_manifest_is_the_same_text_for_the_same_content(made, train):
    text = (made / "bss/manifest.json").read_text()
    assert json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n" == text
    for word in ("time", "date", "host", "user", str(made)):
        assert word not in text


def test_the_search_of_the_paper_fills_the_same_columns(tmp_path, train):
    dataset = sample_dataset(tmp_path, train, {"search.name": "heo2019", "attack.views": 1})
    make_missing(dataset, tmp_path)
    manifest = dataset.publish(tmp_path / "bss")
    assert find_problems(tmp_path / "bss", manifest) == []
    assert manifest.totals.statuses["base_misclassified"] >= 5
    assert manifest.parameters["attack"]["search"] == "heo2019"


def test_a_shard_is_opened_through_hdf5_once(made, monkeypatch):
    shards = BoundaryShards(made / "bss")
    columns = shards.manifest.columns
    first = [shards.read(shard, columns) for shard in shards.manifest.shards]
    monkeypatch.setattr(h5py, "File", None)
    for shard, expected in zip(shards.manifest.shards, first, strict=True):
        for name, values in shards.read(shard, columns).items():
            np.testing.assert_array_equal(values, expected[name])


def test_more_shards_than_files_may_be_open_are_read(tmp_path, train):
    dataset = sample_dataset(tmp_path, train, {"attack.rows_per_shard": 2, "attack.views": 2})
    make_missing(dataset, tmp_path)
    dataset.publish(tmp_path / "bss")
    shards = BoundaryShards(tmp_path / "bss")
    assert len(shards.manifest.shards) == 64
    expected = [shards[row]["label"].item() for row in range(len(shards))]
    script = f"""
import resource
import pipeline
from torch.utils.data import DataLoader
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
shards = pipeline.BoundaryShards({str(tmp_path / "bss")!r})
print([shards[row]["label"].item() for row in range(len(shards))])
rows = list(DataLoader(pipeline.StreamedShards({str(tmp_path / "bss")!r}, all_views=True), batch_size=None))
print(len(rows))
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [str(expected), "128"]


def test_more_workers_than_shards_give_every_row_once(tmp_path, train):
    dataset = sample_dataset(tmp_path, train, {"attack.rows_per_shard": 40, "attack.views": 1})
    make_missing(dataset, tmp_path)
    dataset.publish(tmp_path / "bss")
    stream = StreamedShards(tmp_path / "bss")
    assert len(stream.shards.manifest.shards) == 2
    rows = [row["index"].item() for row in DataLoader(stream, batch_size=None, num_workers=5)]
    assert sorted(rows) == list(range(64))
