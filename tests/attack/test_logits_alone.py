"""Datasets of views with the teacher's logits alone: no search, no samples; and logits in half precision."""

import json
import shutil

import numpy as np
import pytest
import torch

from pipeline.core.errors import DataError, ParameterError, ShardError
from pipeline.core.parameters import load_params
from pipeline.doctor import disk
from pipeline.networks.classifier import Architecture
from pipeline.networks.weights import load_weights
from pipeline.report.decision_map import logits_on, map_png
from pipeline.report.samples import typical_examples
from pipeline.report.scenes import scenes_of
from pipeline.shards.check import find_problems
from pipeline.shards.file import read_columns
from pipeline.shards.format import SEARCHED, shard_name
from pipeline.shards.manifest import read_manifest
from pipeline.shards.reader import BoundaryShards
from pipeline.shards.stream import StreamedShards
from tests.support.files import (
    change_manifest,
    make_missing,
    make_project,
    mislabelled,
    reseal,
    run_stage,
    sample_dataset,
    tiny_splits,
    write_params,
)
from tests.support.fits import student_run
from tests.support.helpers import (
    CPU,
    attack_parameters,
    make_shards,
    random_images,
    random_prepared,
    searching,
    tiny_resnet,
    untrained,
)

KINDS = {
    "full": {"attack.targets": 2},
    "alone": {"attack.targets": 0},
    "bare": {"attack.targets": 0, "attack.embed_images": False, "attack.compression": "gzip"},
    "half": {"attack.targets": 2, "attack.logits": "float16"},
    "half alone": {"attack.targets": 0, "attack.logits": "float16"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset of each kind, of the same views by the same teacher."""
    folder = tmp_path_factory.mktemp("made")
    for name, changes in KINDS.items():
        dataset = sample_dataset(folder, mislabelled(tiny_splits()["train"]), changes)
        make_missing(dataset, folder)
        dataset.publish(folder / name / "bss")
        shutil.copy(folder / "teacher.safetensors", folder / name)
    return folder


@pytest.fixture
def copy(tmp_path, made):
    """A copy that a test may spoil."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def columns_in(directory):
    manifest = read_manifest(directory)
    shards = [read_columns(directory / shard.name, manifest.columns) for shard in manifest.shards]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in manifest.columns}


@pytest.mark.parametrize("name", ["alone", "bare"])
def test_columns_of_views_are_those_of_a_dataset_with_samples(made, name):
    full, found = columns_in(made / "full/bss"), columns_in(made / name / "bss")
    assert full.keys() - found.keys() == {*SEARCHED} | ({"image"} if name == "bare" else set())
    for column, values in found.items():
        assert values.dtype == full[column].dtype
        assert np.array_equal(values, full[column]), column


@pytest.mark.parametrize("name", KINDS)
def test_a_dataset_is_whole_and_says_what_it_is(made, name):
    manifest, full = read_manifest(made / name / "bss"), read_manifest(made / "full/bss")
    assert find_problems(made / name / "bss", manifest) == []
    assert manifest.format_version == (1 if name == "full" else 2)
    assert manifest.targets == KINDS[name]["attack.targets"]
    assert manifest.totals.rows == 128
    assert manifest.totals.samples == sum(manifest.totals.statuses.values()) == 128 * manifest.targets
    assert manifest.rows == full.rows
    assert ("search" in manifest.parameters["attack"]) == bool(manifest.targets)


@pytest.mark.parametrize("name", ["half", "half alone"])
def test_half_precision_is_the_nearest_number(made, name):
    full, found = columns_in(made / "full/bss"), columns_in(made / name / "bss")
    expected = full["teacher_logits"].astype(np.float64).astype(np.float16)
    assert found["teacher_logits"].dtype == np.float16
    assert np.array_equal(found["teacher_logits"], expected)
    for column in found.keys() - {"teacher_logits"}:  # samples are searched with all digits
        assert np.array_equal(found[column], full[column]), column


def test_logits_beyond_half_precision_are_refused(tmp_path):
    teacher = tiny_resnet(0, gain=1e6)
    with pytest.raises(ParameterError, match=r"^attack.logits: float16 holds up to 65504, but .* reach [0-9.e+]+: set"):
        make_shards(tmp_path, random_prepared(0, 8), teacher, attack_parameters(targets=0, logits="float16"))
    make_shards(tmp_path, random_prepared(0, 8), teacher, attack_parameters(targets=0))


@pytest.mark.parametrize(("logits", "expected"), [("float32", 4 + 8 + 4 + 1 + 400), ("float16", 4 + 8 + 4 + 1 + 200)])
def test_a_row_of_100_classes_takes_a_few_hundred_bytes(tmp_path, logits, expected):
    """Beside its columns, a shard of 2,048 rows has less than four bytes a row."""
    split = random_prepared(0, 2048, classes=100)
    attack = attack_parameters(views=1, targets=0, rows_per_shard=2048, embed_images=False, logits=logits)
    directory = make_shards(tmp_path, split, tiny_resnet(0, classes=100), attack)
    totals = read_manifest(directory).totals
    assert expected <= totals.bytes / totals.rows < expected + 4


def test_the_search_decides_nothing_and_the_dtype_does(tmp_path):
    train = tiny_splits()["train"]

    def fingerprint(changes):
        return sample_dataset(tmp_path, train, {"attack.targets": 0} | changes).fingerprint

    first = fingerprint({})
    assert first == fingerprint({"search.tolerance": 0.5}) == fingerprint({"search.name": "fgsm"})
    assert first == fingerprint({"attack.logits": "float32"})
    assert len({first, fingerprint({"attack.logits": "float16"}), fingerprint({"attack.targets": 1})}) == 3


def test_what_version_1_can_say_has_its_parameters(made):
    assert set(read_manifest(made / "full/bss").parameters["attack"]) == {
        *("targets", "seed", "rows_per_shard", "embed_images", "compression"),
        *("search", "tolerance", "max_gradients"),
    }


def test_nothing_is_searched(tmp_path):
    train, teacher = tiny_splits()["train"], tiny_resnet(0)
    dataset, search = sample_dataset(tmp_path, train, {"attack.targets": 0}, teacher), searching(teacher)
    passes = []
    search.teacher.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    search.fast.register_forward_hook(lambda *_: pytest.fail("gradients were asked for"))
    for _ in dataset.make(search, dataset.missing()):
        pass
    assert sum(passes) == 2 * 64


def test_rows_are_read_without_samples(made):
    rows = BoundaryShards(made / "alone/bss")
    full = BoundaryShards(made / "full/bss")
    assert set(rows[3]) == {"index", "label", "image", "crop", "flip", "teacher_logits"}
    assert torch.equal(rows[3]["teacher_logits"], full[3]["teacher_logits"])
    streamed = list(StreamedShards(made / "alone/bss", seed=1))
    assert sorted(int(row["index"]) for row in streamed) == list(range(64))
    expected = list(StreamedShards(made / "full/bss", seed=1))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(streamed, expected, strict=True))


def state_of(run):
    return run.fit(0, None).weights.read_bytes()


@pytest.mark.parametrize("method", ["kd", "hinton", "dkd", "dist"])
@pytest.mark.parametrize("name", ["alone", "bare"])
def test_students_are_those_of_a_dataset_with_samples(tmp_path, made, name, method):
    """Bit for bit: the same views in the same order, cut anew where they are not embedded."""
    train = mislabelled(tiny_splits()["train"])
    states = [
        state_of(student_run(tmp_path / each, made / each, method, {"attack.targets": 0}, train=train))
        for each in ("full", name)
    ]
    assert states[0] == states[1]


def test_a_student_from_logits_in_half_precision_is_nearly_the_same(tmp_path, made):
    train, states = mislabelled(tiny_splits()["train"]), []
    for name in ("full", "half", "half alone"):
        weights = student_run(tmp_path / name, made / name, "kd", train=train).fit(0, None).weights
        states.append(load_weights(weights).state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0.02, atol=0.02)
        assert torch.equal(states[1][name], states[2][name])
    assert any(not torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


def test_bss_from_logits_in_half_precision(tmp_path, made):
    train = mislabelled(tiny_splits()["train"])
    curve = student_run(tmp_path, made / "half", "bss", train=train).fit(0, None).curve
    assert all(np.isfinite(row["loss"]) for row in curve)


@pytest.mark.parametrize("method", ["bss", "kd_bss", "bss_alone"])
def test_methods_of_samples_are_refused_before_any_row_is_read(tmp_path, made, monkeypatch, method):
    monkeypatch.setattr(BoundaryShards, "read", lambda *_: pytest.fail("rows were read"))
    with pytest.raises(DataError) as caught:
        student_run(tmp_path, made / "alone", method, train=mislabelled(tiny_splits()["train"]))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"resnet8w2-{method}: trains on boundary-supporting samples, and ")
    assert "has none (attack.targets is 0): take a method that reads logits alone" in message


# Files of strangers


def without_target(values):
    for name in SEARCHED:
        del values["columns"][name]


HOSTILE = {
    "samples without targets": ("full", lambda values: values.update(targets=0), "the columns are not those of"),
    "no columns of samples": ("full", without_target, "the columns are not those of format version 1"),
    "targets without samples": (
        "alone",
        lambda values: values.update(targets=1),
        "the columns are not those of format",
    ),
    "fewer than none": ("alone", lambda values: values.update(targets=-1), "targets: Input should be greater than or"),
    "version 1": ("alone", lambda values: values.update(format_version=1), "not those of format version 1"),
    "another float": (
        "alone",
        lambda values: values["columns"]["teacher_logits"].__setitem__(0, "float64"),
        "the columns are not those of format version 2",
    ),
    "halves in version 1": (
        "full",
        lambda values: values["columns"]["teacher_logits"].__setitem__(0, "float16"),
        "the columns are not those of format version 1",
    ),
    "counts of nothing": (
        "alone",
        lambda values: (
            values["shards"][0]["statuses"].update(converged=1),
            values["totals"]["statuses"].update(converged=1),
        ),
        "counts samples, but has no target classes",
    ),
    "samples in total": (
        "alone",
        lambda values: values["totals"].update(samples=128),
        "the totals are not the sums over the shards",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_an_unsound_manifest_is_refused(copy, case):
    name, change, expected = HOSTILE[case]
    change_manifest(copy / name / "bss", change)
    with pytest.raises(ShardError) as caught:
        read_manifest(copy / name / "bss")
    message = str(caught.value)
    assert message.startswith(f"{copy / name / 'bss/manifest.json'}: ")
    assert expected in message
    assert "\n" not in message


def test_shards_of_another_kind_are_refused(copy):
    """A shard with samples in the place of one without, and logits of another dtype."""
    for name, other, reason in (
        ("alone", "full", "is another shard than it was"),
        ("half alone", "alone", "is another shard than it was"),
    ):
        shutil.copy(copy / other / "bss" / shard_name(0, 0), copy / name / "bss")
        reseal(copy / name / "bss", shard_name(0, 0))
        problems = find_problems(copy / name / "bss", read_manifest(copy / name / "bss"))
        assert len(problems) == 1
        assert reason in problems[0]


# Commands


@pytest.fixture
def here(copy, monkeypatch):
    monkeypatch.chdir(copy)
    return copy


def output_of(*arguments):
    result = run_stage(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_dataset_is_described_and_verified(here):
    said = output_of("shards", "info", "alone/bss")
    facts = dict(line.split(None, 1) if "  " not in line else line.split("  ", 1) for line in said.splitlines())
    assert facts["targets per view"].strip() == "0"
    assert facts["distance (L2, pixels)"].strip() == "no samples"
    assert "status" not in said
    assert "whole, 6 shards, 128 rows, " in output_of("shards", "verify", "bare/bss")


def test_datasets_are_merged_sampled_and_exported(here):
    dataset = sample_dataset(here, mislabelled(tiny_splits()["train"]), KINDS["bare"] | {"attack.seed": 6})
    make_missing(dataset, here)
    dataset.publish(here / "other")
    assert "4 views of 2 datasets, 12 shards, 256 rows" in output_of(
        "shards", "merge", "bare/bss", "other", "--out", "merged"
    )
    assert "whole" in output_of("shards", "verify", "merged")
    merged, parts = columns_in(here / "merged"), [columns_in(here / name) for name in ("bare/bss", "other")]
    for name, values in merged.items():
        assert np.array_equal(values, np.concatenate([part[name] for part in parts])), name
    output_of("shards", "sample", "half alone/bss", "-n", "30", "--out", "preview")
    assert "whole, 2 shards, 30 rows" in output_of("shards", "verify", "preview")
    preview, whole = columns_in(here / "preview"), columns_in(here / "half alone/bss")
    known = {row.tobytes() for row in whole["teacher_logits"]}
    assert all(row.tobytes() in known for row in preview["teacher_logits"])
    parquet = pytest.importorskip("pyarrow.parquet")
    output_of("shards", "export", "half alone/bss", "--out", "parquet")
    table = parquet.read_table(here / "parquet" / "view-000-block-00000.parquet")
    assert set(table.column_names) == {"view", *whole}
    assert np.array_equal(np.array(table["teacher_logits"].to_pylist(), np.float16), whole["teacher_logits"][:24])


def test_views_with_samples_and_without_are_not_merged(here):
    result = run_stage("shards", "merge", "full/bss", "alone/bss", "--out", "merged")
    assert result.exit_code == 1
    assert "alone/bss: format_version is 2, but 1 in full/bss: only views of the same" in result.stderr


@pytest.mark.parametrize("name", ["alone", "bare"])
def test_the_card_speaks_of_logits_alone(made, name):
    text = (made / name / "bss/README.md").read_text()
    assert "# Logits of a teacher on augmented views" in text
    assert "For 2 augmented views of each of 64 training images: the logits of one trained classifier" in text
    assert "There are no boundary-supporting samples" in text
    assert not {"converged", "status", "delta_scale", "perturbation", "Heo et al."} & {*text.split()}
    assert "onverged" not in text
    example = text.split("Or with nothing but h5py:\n\n```python\n")[1].split("```")[0]
    assert "boundary_logits" not in example
    space = {}
    exec(example.replace('"view-', f'"{made / name / "bss"}/view-'), space)
    assert space["teacher_logits"].shape == (24, 4)
    assert ("image" in space) == (name == "alone")


def test_machines_read_the_card(made):
    mlcroissant = pytest.importorskip("mlcroissant")
    for name, images in (("bare", []), ("half alone", ["image"])):
        (rows,) = mlcroissant.Dataset(made / name / "bss/croissant.json").metadata.record_sets
        assert [field.name for field in rows.fields] == ["index", "label", *images, "crop", "flip", "teacher_logits"]


def test_a_plane_of_inputs_is_drawn_without_samples(tmp_path):
    architecture = Architecture("mlp1w8", 3, (1, 1, 2), (0.5,), (0.5,))
    teacher = untrained(architecture, random_images(0, 64, (1, 1, 2)))
    train = random_prepared(0, 40, (1, 1, 2), 3)
    shards = BoundaryShards(make_shards(tmp_path, train, teacher, attack_parameters(targets=0)))
    ((_, scene),) = scenes_of(shards, train, teacher, typical_examples(shards, train, 3))
    assert scene.samples.shape == (0, 2)
    assert len(scene.paths) == 0
    assert scene.images.shape == (40, 2)
    assert map_png(scene, logits_on(teacher, scene.plane, CPU), train.class_names, None).startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder after attack, students, evaluation and report, and what the stages said."""
    directory = tmp_path_factory.mktemp("chain")
    changes = {"attack.targets": 0, "attack.embed_images": False, "methods": ["original", "kd"]}
    make_project(directory, changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        said = {
            "plan": output_of("attack", "--plan"),
            "attack": output_of("attack"),
            "student": output_of("student", "--all"),
            "evaluate": output_of("evaluate"),
            "report": output_of("report"),
        }
    return directory, said


def test_all_stages_run(chain):
    directory, said = chain
    assert "128 to make of 128: 2 views of 64 images; target classes of each: 0" in said["plan"]
    assert "6 shards (6 computed, 0 reused), 128 views with logits alone" in said["attack"]
    page = (directory / "reports/report.html").read_text()
    assert "None: 128 views with the teacher&#39;s logits alone (attack.targets 0)." in page
    assert "None: the dataset has no samples." in page
    assert "None: no image has samples towards two classes." in page
    for name in ("distances.csv", "probability_margins.csv"):
        assert (directory / "reports" / name).read_text().splitlines() == ["from,to,samples"]


def test_more_views_make_only_the_new_ones(chain, tmp_path, monkeypatch):
    shutil.copytree(chain[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    write_params(
        tmp_path / "params.yaml",
        {"teacher.network": "resnet8w2", "attack.targets": 0, "attack.embed_images": False, "attack.views": 4},
    )
    assert "12 shards (6 computed, 6 reused), 256 views" in output_of("attack")


def test_bss_is_refused_by_the_stage(chain, tmp_path, monkeypatch):
    shutil.copytree(chain[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    result = run_stage("student", "--student", "resnet8w2", "--method", "bss")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "resnet8w2-bss: trains on boundary-supporting samples, and data/bss has none" in line


def test_the_disk_that_is_needed_is_that_of_the_columns(chain):
    directory, _ = chain
    need = 128 * (4 + 8 + 4 + 1 + 4 * 4)
    params = load_params(directory / "params.yaml")
    assert next(disk(directory, params, free=need - 1)).state == "problem"
    assert next(disk(directory, params, free=need)).state == "ok"


EXPERIMENT = """
title: Logits
values: {methods: [kd], seeds: 2, training.epochs: 2}
axes:
  views:
    "2": {attack.views: 2, attack.targets: 0}
    "3": {attack.views: 3, attack.targets: 0}
costs: true
"""


def test_an_experiment_of_logits_alone_has_no_cost_of_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path)
    (tmp_path / "logits.yaml").write_text(EXPERIMENT)
    output_of("experiment", "logits.yaml")
    results = json.loads((tmp_path / "reports/experiments/logits/results.json").read_text())
    assert [cell["cost"] for cell in results["cells"]] == [None, None]
    assert [[len(draw) for draw in cell["runs"]] for cell in results["cells"]] == [[2], [2]]
