"""The doctor: what it says of a healthy folder, and of each thing that hinders a run."""

import os
import subprocess
import sys

import h5py
import pytest

from pipeline.core.parameters import load_params
from pipeline.core.provenance import ROOT
from pipeline.core.store import lock
from pipeline.doctor import disk
from tests.support.files import make_project, run_stage, write_params


@pytest.fixture
def project(tmp_path, monkeypatch):
    make_project(tmp_path, {"attack.views": 2})
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines_of(result):
    """(state, topic): text of every line but the last."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    rows = [(line[:9].strip(), line[9:27].strip(), line[27:]) for line in result.stdout.splitlines()[:-1]]
    assert {state for state, _, _ in rows} <= {"ok", "note", "problem"}
    return {(state, topic): text for state, topic, text in rows}


def test_nothing_hinders_a_run_in_a_healthy_folder(project):
    result = run_stage("doctor")
    lines = lines_of(result)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "nothing hinders a run"
    assert lines["ok", "parameters"] == "params.yaml: digits, teacher resnet8w2"
    assert lines["ok", "Python"] == sys.version.split()[0]
    assert "cores" in lines["ok", "machine"]
    assert "3 copies" in lines["ok", "disk"]


@pytest.mark.parametrize(
    ("changes", "topic", "advice"),
    [
        ({"attack.views": 0}, "parameters", "attack.views"),
        ({"dataset.name": "imagefolder", "dataset.path": "photos"}, "dataset", "set dataset.path"),
        ({"dataset.name": "cifar10", "dataset.path": "elsewhere"}, "dataset", "mkdir -p elsewhere"),
        ({"teacher.weights": "mine.safetensors"}, "teacher", "mine.safetensors does not exist"),
    ],
)
def test_a_problem_says_what_to_do(project, changes, topic, advice):
    write_params(project / "params.yaml", changes)
    result = run_stage("doctor")
    assert result.exit_code == 1
    assert advice in lines_of(result)["problem", topic]
    assert result.stdout.splitlines()[-1] == "1 problem"


def test_what_limits_the_cpu_is_told(project, monkeypatch):
    first = min(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {first, 63})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_params(project / "params.yaml", {"runtime.threads": None})
    lines = lines_of(run_stage("doctor"))
    assert "2 of 64 cores for this process (CPU affinity)" in lines["ok", "machine"]
    assert lines["ok", "threads"] == "1 of the CPU (OMP_NUM_THREADS)"
    write_params(project / "params.yaml", {"runtime.threads": 5})
    assert lines_of(run_stage("doctor"))["ok", "threads"] == "5 of the CPU (runtime.threads)"


def test_too_little_disk_is_a_problem(project):
    params = load_params(project / "params.yaml")
    (line,) = disk(project, params, free=1000)
    assert (line.state, line.topic) == ("problem", "disk")
    assert "lower attack.views" in line.text
    (line,) = disk(project, params, free=10**9)
    assert line.state == "ok"


def test_the_need_is_about_what_the_shards_take(project):
    assert run_stage("attack").exit_code == 0
    params = load_params(project / "params.yaml")
    need = 0
    for path in (project / "data/bss").glob("*.h5"):
        with h5py.File(path) as file:
            need += 3 * sum(column.nbytes for column in file.values())
    assert next(disk(project, params, free=need - 1)).state == "problem"
    assert next(disk(project, params, free=need)).state == "ok"


def test_a_run_under_way_is_noted(project):
    with lock(project / ".work/shards.lock", lambda text: None):
        text = lines_of(run_stage("doctor"))["note", "lock"]
    assert f"process {os.getpid()} is at work (shards)" in text
    assert ("note", "lock") not in lines_of(run_stage("doctor"))


def test_a_folder_that_is_no_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_stage("doctor")
    assert result.exit_code == 1
    assert "params.yaml" in lines_of(result)["problem", "parameters"]


def test_what_dvc_would_run_is_told(tmp_path):
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "dvc.yaml").write_text("stages:\n  first:\n    cmd: echo\n    deps: [params.yaml]\n")
    write_params(tmp_path / "params.yaml", {"dataset.path": "."})
    missing = doctor_in(tmp_path)
    assert missing.returncode == 1
    assert "data/code does not exist, and DVC looks at it: mkdir -p data/code" in missing.stdout
    (tmp_path / "data/code").mkdir(parents=True)
    result = doctor_in(tmp_path)
    assert result.returncode == 0, result.stdout
    assert "to run: first: dvc repro" in result.stdout


def doctor_in(directory):
    command = [sys.executable, "-m", "stages.doctor"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
