"""The doctor: what it says of a healthy folder, and of each thing that hinders a run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

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
    for folder in ("data/raw", "data/code", ".dvc"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
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
    assert "GB for the samples" in lines["ok", "disk"]


@pytest.mark.parametrize(
    ("changes", "topic", "advice"),
    [
        ({"attack.views": 0}, "parameters", "attack.views"),
        ({"dataset.name": "imagefolder", "dataset.path": "photos"}, "dataset", "set dataset.path"),
        ({"dataset.name": "cifar10", "dataset.path": "elsewhere"}, "dataset", "mkdir -p elsewhere"),
        ({"teacher.weights": "mine.safetensors"}, "teacher", "teacher.weights: mine.safetensors does not exist"),
        ({"teacher.pretrained": "mine.safetensors"}, "teacher", "teacher.pretrained: mine.safetensors does not exist"),
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
            need += sum(column.nbytes for column in file.values())
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


STAGE = """
stages:
  first:
    cmd: python -c "import pathlib; pathlib.Path('data/made').write_text('done'); pathlib.Path('begun').touch()"
    deps: [params.yaml]
    outs: [data/made]
"""


def checkout(folder):
    """A project of one stage, as it is cloned: a git and DVC repository."""
    folder.mkdir()
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    (folder / "data/code").mkdir(parents=True)
    (folder / "dvc.yaml").write_text(STAGE)
    write_params(folder / "params.yaml", {"dataset.path": "."})
    return folder


def run_here(folder, module, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def without_code(folder):
    (folder / "data/code").rmdir()


def without_git(folder):
    shutil.rmtree(folder / ".git")


def without_dvc(folder):
    shutil.rmtree(folder / ".dvc")


def with_data_elsewhere(folder):
    shutil.move(folder / "data", folder.parent / "elsewhere")
    (folder / "data").symlink_to("../elsewhere")


def with_a_home_in_a_path(folder):
    write_params(folder / "params.yaml", {"dataset.path": "~/photos"})


HINDRANCES = {
    without_code: (
        "code",
        "data/code does not exist, and DVC looks at it: mkdir -p data/code",
        ["mkdir", "-p", "data/code"],
    ),
    without_git: (
        "DVC",
        "this is no git repository: git init, or to do without: dvc config --local core.no_scm true",
        ["dvc", "config", "--local", "core.no_scm", "true"],
    ),
    without_dvc: (
        "DVC",
        "there is no .dvc here: git init && dvc init (without git: dvc init --no-scm)",
        ["sh", "-c", "dvc init && dvc config cache.type hardlink,reflink,copy"],
    ),
    with_data_elsewhere: (
        "DVC",
        "data leads to {elsewhere}, out of the git repository, where DVC keeps no results: make data a folder",
        ["dvc", "config", "--local", "core.no_scm", "true"],
    ),
    with_a_home_in_a_path: (
        "dataset.path",
        "DVC takes ~/photos literally: python -m stages.configure dataset.path={home}/photos",
        ["sed", "-i", "s#~/photos#.#", "params.yaml"],
    ),
}


@pytest.mark.parametrize("spoil", HINDRANCES)
def test_what_hinders_dvc_is_told_before_any_work(tmp_path, spoil):
    folder = checkout(tmp_path / "project")
    assert run_here(folder, "stages.doctor", "--dvc").stdout == ""
    spoil(folder)
    topic, text, mend = HINDRANCES[spoil]
    expected = text.format(elsewhere=tmp_path / "elsewhere", home=Path.home())
    for options in ((), ("--dvc",)):
        found = run_here(folder, "stages.doctor", *options)
        assert found.returncode == 1
        (line,) = [line for line in found.stdout.splitlines() if line.startswith(f"{'problem':<9}{topic:<18}")]
        assert line[27:].startswith(expected)
        assert found.stderr == ""
    assert found.stdout.splitlines() == [line, "1 problem"]
    # It is true, and what it says helps.
    if spoil is not with_a_home_in_a_path:  # which this one stage does not read
        assert run_here(folder, "dvc", "repro").returncode != 0 or spoil is without_code
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    subprocess.run(mend, cwd=folder, check=True, capture_output=True, env=os.environ | {"PATH": path})
    mended = run_here(folder, "stages.doctor", "--dvc")
    assert (mended.returncode, mended.stdout) == (0, "")
    ended = run_here(folder, "dvc", "repro")
    assert ended.returncode == 0, ended.stderr
    assert (folder / "data/made").read_text() == "done"


def inside_another_repository(folder):
    shutil.rmtree(folder / ".git")
    subprocess.run(["git", "init", "-q"], cwd=folder.parent, check=True)


def as_a_worktree(folder):
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["add", "."], [*identity, "commit", "-qm", "first"], ["worktree", "add", "-q", "../tree"]):
        subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)
    shutil.rmtree(folder / ".dvc")
    shutil.move(folder, folder.parent / "main")
    subprocess.run(
        ["git", "worktree", "repair", "../tree"], cwd=folder.parent / "main", check=True, capture_output=True
    )
    (folder.parent / "tree").rename(folder)
    subprocess.run(["git", "worktree", "repair", folder], cwd=folder.parent / "main", check=True, capture_output=True)
    (folder / "data/code").mkdir(parents=True, exist_ok=True)


def with_data_beside(folder):
    (folder / "data").rename(folder / "storage")
    (folder / "data").symlink_to("storage")


def with_raw_data_elsewhere(folder):
    (folder.parent / "photos").mkdir()
    (folder / "data/raw").symlink_to(folder.parent / "photos")
    write_params(folder / "params.yaml", {"dataset.path": "data/raw"})


def with_the_cache_elsewhere(folder):
    for setting in (["cache", "dir", "--local", "../cache"], ["config", "--local", "cache.type", "symlink"]):
        assert run_here(folder, "dvc", *setting).returncode == 0


@pytest.mark.parametrize(
    "change",
    [inside_another_repository, as_a_worktree, with_data_beside, with_raw_data_elsewhere, with_the_cache_elsewhere],
)
def test_what_does_not_hinder_dvc_is_no_problem(tmp_path, change):
    folder = checkout(tmp_path / "project")
    change(folder)
    found = run_here(folder, "stages.doctor", "--dvc")
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    ended = run_here(folder, "dvc", "repro")
    assert ended.returncode == 0, ended.stderr
    assert (folder / "data/made").read_text() == "done"


@pytest.mark.parametrize("kind", [None, "copy", "reflink,copy"])
def test_a_cache_that_keeps_a_copy_of_its_own_is_noted(tmp_path, kind):
    folder = checkout(tmp_path / "project")
    setting = ["--unset", "cache.type"] if kind is None else ["cache.type", kind]
    assert run_here(folder, "dvc", "config", *setting).returncode == 0
    found = run_here(folder, "stages.doctor", "--dvc")
    assert found.returncode == 0
    (line,) = found.stdout.splitlines()
    assert line.startswith(f"note     DVC               cache.type is {kind or 'not set'}: ")
    advice = line.rpartition(": ")[2].split()
    assert advice[0] == "dvc"
    assert run_here(folder, *advice).returncode == 0
    assert run_here(folder, "stages.doctor", "--dvc").stdout == ""


def test_what_dvc_would_run_is_told(tmp_path):
    result = run_here(checkout(tmp_path / "project"), "stages.doctor")
    assert result.returncode == 0, result.stdout
    assert "to run: first: dvc repro" in result.stdout


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path, monkeypatch):
    folder = checkout(tmp_path / "project")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != ".")  # the superuser may write anything
    result = run_stage("doctor", "--dvc")
    assert result.exit_code == 1
    assert f"{folder} cannot be written: copy the project to a folder of yours" in result.stdout


def test_make_repro_asks_first():
    recipe = (ROOT / "Makefile").read_text().partition("\nrepro:")[2].partition("\n\n")[0].splitlines()
    assert recipe[1:] == ["\t@python -m stages.doctor --dvc", "\tdvc repro"]
