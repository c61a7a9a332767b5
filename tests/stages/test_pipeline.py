"""The whole pipeline through `dvc repro`, in a clone of its own, on a tiny configuration."""

import io
import json
import re
import shutil
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from pipeline.networks.stack import MEMBERS
from tests.support.projects import change_params, digests, dvc, new_project, repro, run_in

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A git repository with the project's files and tiny parameters, built once by `dvc repro`."""
    directory = tmp_path_factory.mktemp("clone") / "project"
    new_project(
        directory,
        {
            "attack.views": 2,
            "attack.rows_per_shard": 400,
            "seeds": 2,
            "teacher.network": "resnet8w4",
            "teacher.training.epochs": 4,
            "training.epochs": 2,
        },
    )
    repro(directory)
    return directory


def experiment(directory, *arguments):
    """What `dvc exp run` prints."""
    return dvc(directory, "exp", "run", *arguments)


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name}: {text.count(old)} times: {old}"
    path.write_text(text.replace(old, new))


def test_summary_has_the_promised_form(clone):
    summary = json.loads((clone / "reports/summary.json").read_text())
    assert summary["dataset"] == "digits"
    assert 0.5 < summary["teacher"]["accuracy"] <= 1
    assert set(summary["students"]) == {"resnet8w2"}
    for figures in summary["students"]["resnet8w2"].values():
        for measure in ("accuracy", "agreement", "mag_sim", "ang_sim"):
            assert set(figures[measure]) == {"mean", "std", "n"}
        assert 0 < figures["accuracy"]["mean"] < 1
        assert figures["accuracy"]["n"] == 2


def test_second_run_does_nothing(clone):
    output = repro(clone)
    assert "Running stage" not in output
    assert "up to date" in output


def test_more_views_compute_only_the_new_ones_and_a_reverted_parameter_comes_from_the_run_cache(clone):
    before = digests(clone / "data/bss")
    change_params(clone, {"attack.views": 3})
    output = repro(clone, "attack")
    assert "(3 computed, 6 reused)" in output
    after = digests(clone / "data/bss")
    assert {name: after[name] for name in before if name.endswith(".h5")} == {
        name: digest for name, digest in before.items() if name.endswith(".h5")
    }
    change_params(clone, {"attack.views": 2})
    output = repro(clone)
    assert "Running stage" not in output
    assert digests(clone / "data/bss") == before


def test_another_seed_and_another_method_train_only_what_is_new(clone):
    change_params(clone, {"seeds": 3, "methods": ["original", "hinton", "bss", "hinton_online"]})
    output = repro(clone)
    assert output.count("(0 trained, 3 reused)") == 3  # the third one came along in the stack of the first two
    assert output.count("(3 trained, 0 reused)") == 1
    assert "> python -m stages.attack" not in output
    summary = json.loads((clone / "reports/summary.json").read_text())
    methods = summary["students"]["resnet8w2"]
    assert {method: figures["accuracy"]["n"] for method, figures in methods.items()} == {
        "original": 3,
        "hinton": 3,
        "bss": 3,
        "hinton_online": 3,
    }


def test_a_comment_in_the_search_keeps_the_shards_and_an_edit_does_not(clone):
    search = clone / "pipeline/search/newton.py"
    original = search.read_text()
    search.write_text(original + "\n# Only a comment.\n")
    assert "(0 computed, 6 reused)" in repro(clone, "attack")
    edit(search, "AIM = 0.95", "AIM = 0.9")
    assert "(6 computed, 0 reused)" in repro(clone, "attack")
    search.write_text(original)
    assert "Running stage" not in repro(clone, "attack")


def test_shards_are_the_same_bytes_without_the_store(clone):
    before = digests(clone / "data/bss")
    shutil.rmtree(clone / ".work")
    repro(clone, "--force", "--single-item", "attack")
    assert digests(clone / "data/bss") == before


def test_an_experiment_changes_one_parameter_and_keeps_the_comments(clone):
    before = (clone / "params.yaml").read_text()
    assert "(6 computed, 6 reused)" in experiment(clone, "-S", "attack.views=4", "attack")
    assert re.findall("#.*", (clone / "params.yaml").read_text()) == re.findall("#.*", before)
    (clone / "params.yaml").write_text(before)
    assert "Running stage" not in repro(clone, "attack")


def write_archive(path, seed):
    generator = np.random.default_rng(seed)
    with zipfile.ZipFile(path, "w") as archive:
        for row in range(40):
            content = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (8, 8), np.uint8)).save(content, "PNG")
            archive.writestr(f"{'ab'[row % 2]}/{row}.png", content.getvalue())


def test_changed_images_are_noticed(clone):
    before = (clone / "params.yaml").read_text()
    write_archive(clone.parent / "images.zip", seed=0)
    change_params(clone, {"dataset.name": "imagefolder", "dataset.path": "../images.zip"})
    assert "imagefolder, 2 classes" in repro(clone, "prepare")
    first = digests(clone / "data/prepared")
    assert "Running stage" not in repro(clone, "prepare")
    write_archive(clone.parent / "images.zip", seed=1)
    assert "imagefolder, 2 classes" in repro(clone, "prepare")
    assert digests(clone / "data/prepared") != first
    (clone / "params.yaml").write_text(before)
    assert "Running stage" not in repro(clone, "prepare")  # digits come from the run cache


def test_a_bad_parameter_stops_the_run_and_keeps_what_is_published(clone):
    before = (clone / "dvc.lock").read_bytes()
    change_params(clone, {"attack.views": 0})
    code, output = run_in(clone, ["dvc", "repro"])
    assert code != 0
    assert "attack.views" in output
    assert (clone / "dvc.lock").read_bytes() == before
    change_params(clone, {"attack.views": 2})
    assert "Running stage" not in repro(clone, "attack")


def trained(directory):
    """When each student that is kept was written."""
    return {path: path.stat().st_mtime_ns for path in (directory / ".work/fits").rglob("weights.safetensors")}


def test_an_experiment_needs_the_teacher_alone_and_trains_nothing_twice(tmp_path):
    directory = tmp_path / "project"
    tiny = {"attack.views": 1, "teacher.network": "resnet8w4", "teacher.training.epochs": 4, "training.epochs": 2}
    new_project(directory, tiny)
    (directory / "experiments/methods.yaml").write_text("title: Mine\nvalues: {methods: [original, at], seeds: 2}\n")
    command = [sys.executable, "-m", "stages.experiment", "experiments/methods.yaml"]
    code, output = run_in(directory, command)
    assert code != 0
    assert "data/prepared" in output
    output = repro(directory, "teacher")
    assert "Running stage 'teacher'" in output
    assert "Running stage 'attack'" not in output  # an experiment makes samples of its own
    before = trained(directory)

    code, output = run_in(directory, command)
    assert code == 0, output
    assert "wrote reports/experiments/methods: results.json, table.md (4 students)" in output
    table = (directory / "reports/experiments/methods/table.md").read_text()
    assert [line.split(" | ")[:2] for line in table.splitlines()[2:4]] == [["| original", "2"], ["| at", "2"]]
    first = trained(directory)
    assert before.items() <= first.items()
    assert len(first) - len(before) == MEMBERS + 2  # a stack, and two whose loss reads features

    assert run_in(directory, command)[0] == 0
    assert trained(directory) == first
    assert (directory / "reports/experiments/methods/table.md").read_text() == table
    assert "experiment" not in dvc(directory, "stage", "list")  # `dvc repro` runs the pipeline alone
    change_params(directory, {"method.at.at.weight": 2})
    assert "Running stage" not in repro(directory, "teacher")
    assert run_in(directory, command)[0] == 0
    again = trained(directory)
    assert first.items() <= again.items()
    assert len(again) - len(first) == 2  # those of `at` alone
