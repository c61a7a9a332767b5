"""The whole pipeline through `dvc repro`, in a clone of its own, on a tiny configuration."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from pipeline.provenance import ROOT

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A git repository with the project's files and tiny parameters, built once by `dvc repro`."""
    directory = tmp_path_factory.mktemp("clone") / "project"
    directory.mkdir()
    for name in ("pipeline", "stages", "data", ".dvc"):
        ignore = shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local", "prepared", "bss", "raw")
        shutil.copytree(ROOT / name, directory / name, ignore=ignore)
    (directory / "data/raw").mkdir()
    for name in ("dvc.yaml", "params.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, directory / name)
    change_params(
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
    subprocess.run(["git", "init", "-q"], cwd=directory, check=True)
    subprocess.run(["git", "add", "."], cwd=directory, check=True)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, "commit", "-qm", "start"], cwd=directory, check=True)
    repro(directory)
    return directory


def change_params(directory, changes):
    yaml = YAML()
    path = directory / "params.yaml"
    values = yaml.load(path)
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        section[last] = value
    yaml.dump(values, path)


def repro(directory, *arguments):
    """What `dvc repro` prints."""
    return dvc(directory, "repro", *arguments)


def dvc(directory, *arguments, environment=None):
    """What a DVC command prints that must end well; the running Python's commands come first on the path."""
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    result = subprocess.run(
        ["dvc", *arguments],
        cwd=directory,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(directory)} | (environment or {}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def experiment(directory, *arguments):
    """What `dvc exp run` prints."""
    names = [f"GIT_{role}_{what}" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")]
    return dvc(directory, "exp", "run", *arguments, environment=dict.fromkeys(names, "test@example.org"))


def digests(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.glob("*"))}


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
    assert output.count("(1 trained, 2 reused)") == 3
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
    search = clone / "pipeline/newton.py"
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
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    result = subprocess.run(
        ["dvc", "repro"], cwd=clone, env=os.environ | {"PATH": path}, text=True, capture_output=True
    )
    assert result.returncode != 0
    assert "attack.views" in result.stdout + result.stderr
    assert (clone / "dvc.lock").read_bytes() == before
    change_params(clone, {"attack.views": 2})
    assert "Running stage" not in repro(clone, "attack")
