"""The teacher is asked again: planted differences are found, those of rounding pass."""

import functools
import itertools
import shutil

import h5py
import numpy as np
import pytest
import torch

from pipeline.attack.teacher_check import check_teacher, draw_rows, teacher_of
from pipeline.core.files import file_digest
from pipeline.core.status import Status
from pipeline.images.prepared import write_prepared
from pipeline.networks.weights import load_weights, save_weights
from pipeline.shards.reader import BoundaryShards
from tests.support.files import (
    change_manifest,
    make_missing,
    mislabelled,
    reseal,
    run_stage,
    sample_dataset,
    tiny_splits,
    tiny_teacher,
    write_params,
)
from tests.support.helpers import CPU, tiny_resnet
from tests.support.web import Handler, served

SHARD = "view-001-block-00001.h5"  # rows 88 to 111 of 128
FIRST = 64 + 24  # of these rows
KINDS = {
    "embedded": {},
    "cut again": {"attack.embed_images": False},
    "resized and coloured": {
        "attack.embed_images": False,
        "views.padding": 0,
        "views.scale": [0.5, 1.0],
        "views.jitter": [0.3, 0.3, 0.0],
    },
    "float16, features, three targets": {"attack.logits": "float16", "attack.features": True, "attack.targets": 3},
    "compressed": {"attack.compression": "gzip"},
    "logits alone": {"attack.targets": 0},
    "off the boundary": {"search.name": "fgsm"},
}


@functools.cache
def train():
    return mislabelled(tiny_splits()["train"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder by kind: `bss`, `teacher.safetensors`, `prepared` and `params.yaml`."""

    @functools.cache
    def make(kind):
        directory = tmp_path_factory.mktemp("made")
        dataset = sample_dataset(directory, train(), KINDS[kind])
        make_missing(dataset, directory)
        dataset.publish(directory / "bss")
        write_prepared(directory / "prepared/train.h5", train())
        write_params(directory / "params.yaml")
        return directory

    return make


def asked(directory, *arguments, place=None, teacher="teacher.safetensors"):
    """The result of the command, about 1,000 rows if there are so many."""
    given = ("--teacher", directory / teacher, "--prepared", directory / "prepared")
    return run_stage(
        "shards", "verify", place or directory / "bss", *given, "--params", directory / "params.yaml", *arguments
    )


def copied(directory, to):
    return shutil.copytree(directory, to / "copy")


def plant(directory, change, name=SHARD):
    """Change a shard, by a function of its open file, and its digest with it."""
    with h5py.File(directory / "bss" / name, "r+") as file:
        change(file)
    reseal(directory / "bss", name)


def changed(column, place, by):
    """A change of one number of a column."""

    def change(file):
        values = file[column][:]
        values[place] += by
        file[column][:] = values

    return change


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_says_again_what_it_said(made, kind):
    result = asked(made(kind))
    assert result.exit_code == 0, result.output
    assert "was asked about 128 of 128 rows, in 6 of 6 shards: logits differ by " in result.stdout
    assert ("100.00% of" in result.stdout) == (kind != "logits alone")
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("kind", "column"),
    [
        *itertools.product(["embedded", "compressed"], ["teacher_logits", "boundary_logits", "margin", "delta"]),
        *itertools.product(["float16, features, three targets"], ["teacher_logits", "teacher_features", "margin"]),
        ("logits alone", "teacher_logits"),
    ],
)
def test_one_number_that_was_changed_with_its_digest_is_found(made, tmp_path, kind, column):
    directory = copied(made(kind), tmp_path)
    with h5py.File(directory / "bss" / SHARD) as file:
        row = int(np.argmax(file["status"][:, 0] == Status.CONVERGED)) if "status" in file else 5
        shape = file[column].shape
    number = (row, *[0] * (len(shape) - 1))
    plant(directory, changed(column, number, {"delta": 90}.get(column, 0.5)))
    result = asked(directory)
    assert result.exit_code == 1
    place, problem, end = result.stderr.partition("\n")[0].partition(" differs by ")
    told = "boundary_logits" if column == "delta" else column
    assert place == f"{directory}/bss/{SHARD}: row {row}: column '{told}'"
    assert problem
    assert "from what the teacher says (rounding: up to 0.0" in end
    assert result.stderr.endswith("1 problem\n")
    if column == "teacher_logits":  # which nothing else can tell
        assert run_stage("shards", "verify", directory / "bss").exit_code == 0


def test_a_row_is_found_by_chance_and_a_shard_for_certain(made, tmp_path):
    directory = copied(made("embedded"), tmp_path)
    plant(directory, changed("teacher_logits", (5, 0), 0.5))
    found = [asked(directory, "--rows", 64, "--seed", seed).exit_code for seed in range(6)]
    assert found == [int(FIRST + 5 in draw_rows(128, 64, seed)) for seed in range(6)]
    assert sum(found) == 4
    plant(directory, changed("teacher_logits", (slice(None), 0), 0.5))
    for seed in range(4):
        result = asked(directory, "--rows", 12, "--seed", seed)
        assert result.exit_code == 1
        assert SHARD in result.stderr
        assert "asked about 12 of 128 rows" in result.stdout


def test_a_shard_of_another_teacher_is_named_with_its_rows(made, tmp_path):
    directory, other = copied(made("embedded"), tmp_path), tmp_path / "other"
    other.mkdir()
    dataset = sample_dataset(other, train(), teacher=tiny_resnet(3))
    make_missing(dataset, other)
    dataset.publish(other / "bss")
    shutil.copy(other / "bss" / SHARD, directory / "bss" / SHARD)
    fingerprint = BoundaryShards(directory / "bss", verify=False).manifest.fingerprint
    plant(directory, lambda file: file.attrs.modify("fingerprint", np.bytes_(fingerprint)))
    result = asked(directory, "--rows", 40)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"{directory}/bss/{SHARD}: row ")
    assert "more of the rows drawn" in result.stderr
    assert result.stderr.count("\n") == 2


@pytest.mark.parametrize("kind", ["embedded", "cut again", "resized and coloured"])
def test_views_of_another_crop_are_found(made, tmp_path, kind):
    directory = copied(made(kind), tmp_path)

    def move(file):
        if kind == "embedded":
            file["image"][:] = np.roll(file["image"][:], 1, -1)
        elif kind == "cut again":
            file["crop"][:] = (file["crop"][:] + 1) % 3
        else:
            file["flip"][:] = 1 - file["flip"][:]

    plant(directory, move)
    result = asked(directory, "--rows", 12)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"{directory}/bss/{SHARD}: row ")


def test_a_status_that_the_logits_do_not_give_is_found(made, tmp_path):
    directory = copied(made("off the boundary"), tmp_path)
    with h5py.File(directory / "bss" / SHARD) as file:
        row = int(np.argmax(file["status"][:, 0] == Status.NOT_CONVERGED))
    plant(directory, changed("status", (row, 0), Status.THIRD_CLASS - Status.NOT_CONVERGED))
    result = asked(directory)
    assert f"{SHARD}: row {row}: column 'status' differs from what the teacher's logits give" in result.stderr
    assert "99.22% of 128 statuses hold" in result.stdout


def test_what_a_bad_gradient_left_need_not_be_finite(made, tmp_path):
    directory = copied(made("embedded"), tmp_path)

    def end(file):
        for column, value in (("status", Status.BAD_GRADIENT), ("boundary_logits", np.nan), ("margin", np.nan)):
            values = file[column][:]
            values[3] = value
            file[column][:] = values

    plant(directory, end)
    assert asked(directory).exit_code == 0


@pytest.mark.parametrize(("size", "passes"), [(1e-6, True), (1e-5, True), (1e-2, False)])
@pytest.mark.parametrize("kind", ["embedded", "float16, features, three targets"])
def test_rounding_passes_and_another_network_does_not(made, kind, size, passes):
    """Weights that differ in their last bits stand for a machine that rounds otherwise."""
    directory = made(kind)
    shards, teacher = BoundaryShards(directory / "bss"), load_weights(directory / "teacher.safetensors")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.mul_(1 + size * torch.randn(weight.shape, generator=generator))
    found = check_teacher(shards, teacher, None, np.arange(len(shards)), CPU, lambda rows: None)
    assert (not found.problems) == passes
    assert found.logits > 0
    assert found.samples == len(shards) * shards.manifest.targets


def test_another_teacher_is_refused_by_name(made, tmp_path):
    directory = copied(made("embedded"), tmp_path)
    missing = asked(directory, teacher="none.safetensors")
    assert missing.stderr == f"error: {directory}/none.safetensors: no such weights file\n"
    save_weights(tiny_resnet(3), directory / "other.safetensors")
    other = asked(directory, teacher="other.safetensors")
    digest = file_digest(directory / "teacher.safetensors")
    assert f"other.safetensors: not the teacher of the samples in {directory}/bss" in other.stderr
    assert f"that of their teacher with {digest[:16]}" in other.stderr
    for wrong in (tiny_resnet(3, classes=5), tiny_resnet(3, shape=(3, 8, 8))):
        save_weights(wrong, directory / "wrong.safetensors")
        digest = file_digest(directory / "wrong.safetensors")
        change_manifest(directory / "bss", lambda values, digest=digest: values["digests"].update(teacher=digest))
        refused = asked(directory, teacher="wrong.safetensors")
        assert "wrong.safetensors: a teacher for images" in refused.stderr
        assert "are (1, 8, 8) of 4" in refused.stderr
    for result in (missing, other, refused):
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1


def test_without_images_the_prepared_data_is_asked_for(made, tmp_path):
    directory = copied(made("cut again"), tmp_path)
    write_prepared(directory / "prepared/train.h5", tiny_splits()["test"])
    other = asked(directory)
    shutil.rmtree(directory / "prepared")
    absent = asked(directory)
    assert "the shards were made from other training data" in other.stderr
    assert "do not embed their images (attack.embed_images), so the prepared training data is needed" in absent.stderr
    for result in (other, absent):
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("column", "value"), [("label", 9999), ("status", 200), ("target", 4), ("index", 2**31), ("crop", 3000)]
)
def test_what_is_not_possible_is_refused_before_the_teacher_is_asked(made, tmp_path, column, value):
    directory = copied(made("cut again"), tmp_path)

    def change(file):
        values = file[column][:]
        values[7] = value
        file[column][:] = values

    plant(directory, change)
    result = asked(directory)
    assert result.exit_code == 1
    assert result.stderr == f"error: {directory}/bss/{SHARD}: row 7 holds values that are not possible\n"


def test_a_dataset_behind_a_url_is_read_in_the_drawn_rows_alone(made):
    directory = made("embedded")
    with served(directory) as url:
        before = Handler.sent
        result = asked(directory, "--rows", 1, place=f"{url}/bss")
        assert result.exit_code == 0, result.output
        assert "was asked about 1 of 128 rows, in 1 of 6 shards" in result.stdout
        read = Handler.sent - before - (directory / "bss/manifest.json").stat().st_size
        assert read < sum(path.stat().st_size for path in (directory / "bss").glob("*.h5")) / 4


def test_the_teacher_lies_where_the_project_has_it(made, tmp_path, monkeypatch):
    directory = copied(made("embedded"), tmp_path)
    (directory / "models").mkdir()
    (directory / "teacher.safetensors").rename(directory / "models/teacher.safetensors")
    monkeypatch.chdir(directory)
    result = run_stage("shards", "verify", "bss", "--teacher")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("bss: models/teacher.safetensors was asked about 128 of 128 rows")


@pytest.mark.parametrize(("total", "count"), [(1, 1), (10, 10), (10, 1000), (128, 12), (1000, 999), (10**8, 1000)])
def test_rows_are_drawn_all_over(total, count):
    rows = draw_rows(total, count, seed=1)
    assert len(rows) == min(count, total)
    assert len(np.unique(rows)) == len(rows)
    assert rows[0] >= 0
    assert rows[-1] < total
    assert (np.diff(rows) > 0).all()
    across = np.diff(np.append(rows, rows[0] + total))
    assert (across < 2 * -(-total // count)).all()  # a shard of so many rows has one of them
    assert np.array_equal(rows, draw_rows(total, count, seed=1))


def test_every_row_is_drawn_as_often():
    times = sum(np.bincount(draw_rows(50, 20, seed), minlength=50) for seed in range(2000))
    np.testing.assert_allclose(times / 2000, 0.4, atol=0.05)


def test_a_teacher_is_read_by_its_digest(made):
    directory = made("embedded")
    model = teacher_of(directory / "teacher.safetensors", BoundaryShards(directory / "bss"))
    assert model.architecture == tiny_teacher().architecture
