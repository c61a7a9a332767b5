"""Nothing is lost: kills at any moment, damage, full disks, dead workers, two runs at once.

Each fault is made for real, on stages in processes of their own, and each ends in the same bytes as an undisturbed run.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from pipeline.core import files as storage
from pipeline.core.provenance import ROOT
from pipeline.networks.weights import save_weights
from pipeline.shards.check import find_problems
from pipeline.shards.manifest import read_manifest
from pipeline.training import fit as training
from tests.support.files import (
    change_manifest,
    contents,
    finish,
    flip_bit,
    fork_stage,
    make_project,
    run_stage,
    start_stage,
    tiny_teacher,
    truncate,
    write_params,
)

pytestmark = pytest.mark.faults

KILLS = 20
VIEWS = 40  # three shards each: enough to be killed in the middle
INTERRUPTED = "interrupted: what is finished is kept, run the same command to go on"
BSS = ("student", "--student", "resnet8w2", "--method", "bss")
# Long enough to be killed at twenty different moments.
LONG = {
    "attack": {"attack.views": VIEWS},
    "teacher": {"teacher.training.epochs": 150},
    "student": {"training.epochs": 60, "runtime.workers": 2, "runtime.threads": 2},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder as after `prepare`, `teacher` and `attack` with two views."""
    directory = tmp_path_factory.mktemp("prepared")
    make_project(directory)
    succeed(fork_stage(directory, "attack"))
    return directory


@pytest.fixture
def project(prepared, tmp_path, monkeypatch):
    """A copy of that folder, as the current one."""
    directory = tmp_path / "project"
    shutil.copytree(prepared, directory)
    monkeypatch.chdir(directory)
    return directory


def succeed(process):
    """(stdout, stderr) of a started stage that must end well."""
    code, stdout, stderr = finish(process)
    assert code == 0, stderr
    assert "Traceback" not in stderr
    return stdout, stderr


def fail(process, *words):
    """Standard error of a started stage that must end with an error in one line, which has all of these words."""
    code, stdout, stderr = finish(process)
    assert (code, stdout) == (1, ""), stderr
    assert "Traceback" not in stderr
    assert stderr.startswith("error: ")
    assert len(stderr.splitlines()) == 1
    assert all(word in stderr for word in words), stderr
    return stderr


def assert_whole_or_absent(directory):
    """What is published is a whole dataset at every moment but that of the exchange, when there is none."""
    if directory.exists():
        assert find_problems(directory, read_manifest(directory)) == []


def undisturbed(project, directory, command, *published):
    """Files of a run that nobody disturbs, below the folder's name for it, and how long it took."""
    shutil.copytree(project, directory)
    begin = time.monotonic()
    succeed(fork_stage(directory, *command))
    return {name: contents_below(directory / name) for name in published}, time.monotonic() - begin


def contents_below(directory):
    return {path.removeprefix(str(directory)): digest for path, digest in contents(directory).items()}


# ----------------------------------------------------------------------------------------------------------------------
# Killed


PUBLISHED = {"attack": "data/bss", "teacher": "models", "student": "models/students"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_killed_at_twenty_random_moments(project, tmp_path, monkeypatch, name):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2"} | LONG[name])
    if name == "teacher":
        (project / "models/teacher.safetensors").unlink()
    command = BSS if name == "student" else (name,)
    expected, seconds = undisturbed(project, tmp_path / "undisturbed", command, PUBLISHED[name])

    generator, killed, finished = random.Random(name), 0, 0
    while killed < KILLS:
        process = fork_stage(project, *command)
        # Each life is so short that the work lasts for many; the last ones fall into writing the result.
        time.sleep(generator.uniform(0, 2.5 * seconds / KILLS))
        if process.poll() is not None:  # it was faster than we: once more from the beginning
            succeed(process)
            assert contents_below(project / PUBLISHED[name]) == expected[PUBLISHED[name]]
            shutil.rmtree(project / ".work")
            finished += 1
            continue
        os.kill(process.pid, signal.SIGKILL)  # its forks must find out by themselves
        process.kill()
        killed += 1
        assert_whole_or_absent(project / "data/bss")
    succeed(fork_stage(project, *command))
    assert contents_below(project / PUBLISHED[name]) == expected[PUBLISHED[name]]
    assert list((project / ".work").rglob("*.tmp")) + list((project / "data").rglob("*.tmp")) == []
    print(f"{name}: killed {killed} times, finished {finished + 1} times")


def killed_at_step(step):
    """From now on, count the steps that change files for good, and die before the given one."""
    taken = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal taken
            taken += 1
            if taken == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    steps = ((os, "replace"), (os, "rename"), (os, "fsync"), (shutil, "rmtree"), (os, "unlink"), (os, "link"))
    for module, function in steps:
        setattr(module, function, counted(getattr(module, function)))


def test_killed_before_every_step_that_changes_files(project, tmp_path):
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "attack.rows_per_shard": 64})
    expected, _ = undisturbed(project, tmp_path / "undisturbed", ("attack",), "data/bss")
    old = contents_below(project / "data/bss")
    for step in range(1, 100):
        directory = tmp_path / "killed"
        shutil.copytree(project, directory)
        process = fork_stage(directory, "attack", before=lambda step=step: killed_at_step(step))
        code, _, _ = finish(process)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if (directory / "data/bss").exists():
            assert contents_below(directory / "data/bss") in (old, expected["data/bss"])
        succeed(fork_stage(directory, "attack"))
        assert contents_below(directory / "data/bss") == expected["data/bss"]
        assert list(directory.rglob("*.tmp")) == []
        shutil.rmtree(directory)
    assert step > 20
    print(f"killed before each of {step - 1} steps")


# ----------------------------------------------------------------------------------------------------------------------
# Damage

SHARD = "view-001-block-00001.h5"


def other_dataset(project):
    """A dataset of another teacher and the same images, with its store."""
    directory = project.parent / "other"
    make_project(directory)
    weights = directory / "models/teacher.safetensors"
    state = {name: tensor * 1.01 for name, tensor in tiny_teacher().network.state_dict().items()}
    teacher = tiny_teacher()
    teacher.network.load_state_dict(state)
    weights.unlink()
    save_weights(teacher, weights)
    succeed(fork_stage(directory, "attack"))
    return directory


def from_other(path, project):
    shutil.copy(other_dataset(project) / "data/bss" / path.name, path)


DAMAGE = {
    "truncated": lambda path, project: truncate(path),
    "one bit flipped": lambda path, project: flip_bit(path, path.stat().st_size // 2),
    "emptied": lambda path, project: path.write_bytes(b""),
    "of another teacher": from_other,
    "removed": lambda path, project: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_published_shard_is_named_refused_and_mended(project, damage):
    before = contents(project / "data/bss")
    path = project / "data/bss" / SHARD
    DAMAGE[damage](path, project)
    result = run_stage("shards", "verify", "data/bss")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"data/bss/{SHARD}: ")
    fail(fork_stage(project, *BSS), f"data/bss/{SHARD}: ")
    assert "(0 computed, 6 reused)" in succeed(fork_stage(project, "attack"))[0]
    assert contents(project / "data/bss") == before


@pytest.mark.parametrize("damage", [*DAMAGE, "of another teacher, with its digest"])
def test_a_damaged_stored_shard_is_made_again_alone(project, damage):
    before = contents(project / "data/bss")
    (path,) = (project / ".work/shards").rglob(SHARD)
    DAMAGE[damage.split(",")[0]](path, project)
    if "with its digest" in damage:
        path.with_name(path.name + ".sha256").write_text(storage.file_digest(path))
    assert "(1 computed, 5 reused)" in succeed(fork_stage(project, "attack"))[0]
    assert contents(project / "data/bss") == before


def another_runs_manifest(project):
    shutil.copy(other_dataset(project) / "data/bss/manifest.json", project / "data/bss/manifest.json")


def other_views(project):
    change_manifest(project / "data/bss", lambda values: values.update(views=1))


MANIFEST_DAMAGE = {
    "truncated": lambda project: truncate(project / "data/bss/manifest.json"),
    "emptied": lambda project: (project / "data/bss/manifest.json").write_bytes(b""),
    "of another run": another_runs_manifest,
    "of other views": other_views,
    "removed": lambda project: (project / "data/bss/manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", MANIFEST_DAMAGE)
def test_a_damaged_manifest_is_named_refused_and_mended(project, damage):
    before = contents(project / "data/bss")
    MANIFEST_DAMAGE[damage](project)
    result = run_stage("shards", "verify", "data/bss")
    assert result.exit_code == 1
    assert "data/bss/" in result.stderr
    fail(fork_stage(project, *BSS), "data/bss/")
    assert "(0 computed, 6 reused)" in succeed(fork_stage(project, "attack"))[0]
    assert contents(project / "data/bss") == before


def test_the_store_is_removed(project):
    before = contents(project / "data/bss")
    shutil.rmtree(project / ".work")
    assert "(6 computed, 0 reused)" in succeed(fork_stage(project, "attack"))[0]
    assert contents(project / "data/bss") == before


def test_the_store_is_removed_while_shards_are_made(project):
    before = contents(project / "data/bss")
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "attack.views": VIEWS})
    process = fork_stage(project, "attack")
    wait_for(lambda: len(list((project / ".work/shards").rglob("*.sha256"))) > 12, process)
    shutil.rmtree(project / ".work", ignore_errors=True)
    fail(process, ".work/shards/", "run the attack again")
    assert contents(project / "data/bss") == before
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2"})
    succeed(fork_stage(project, "attack"))
    assert contents(project / "data/bss") == before


# ----------------------------------------------------------------------------------------------------------------------
# The machine: disk, permission, clock


def in_a_namespace(project, *commands):
    """Run shell commands in a mount namespace of their own."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine has no user namespaces to mount file systems in")
    return subprocess.run(
        ["unshare", "-rm", "bash", "-c", "\n".join(["set -u", *commands])],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"},
        text=True,
        capture_output=True,
        timeout=120,
    )


@pytest.mark.parametrize("full", ["data", ".work"])
def test_a_full_file_system_is_one_line_and_leaves_what_is_published(project, full):
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "attack.views": 4})
    size = sum(path.stat().st_size for path in (project / full).rglob("*")) + 100_000
    result = in_a_namespace(
        project,
        f"cp -r {full} copy && mount -t tmpfs -o size={size} tmpfs {full} && cp -r copy/. {full} || exit 99",
        "python -m stages.attack; echo attack $?",
        "python -m stages.shards verify data/bss",
        "find . -name '*.tmp'",
    )
    lines = result.stdout.splitlines()
    assert lines[0] == "attack 1", result.stderr
    assert lines[1].startswith("data/bss: whole, 6 shards")
    assert len(lines) == 2
    (error,) = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert "no space to write it" in error


def test_an_output_that_is_read_only_is_one_line_and_leaves_what_is_published(project):
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "attack.views": 3})
    result = in_a_namespace(
        project,
        "mount --bind data data && mount -o remount,ro,bind data || exit 99",
        "python -m stages.attack; echo attack $?",
        "python -m stages.shards verify data/bss",
    )
    lines = result.stdout.splitlines()
    assert lines[0] == "attack 1", result.stderr
    assert lines[1].startswith("data/bss: whole, 6 shards")
    (error,) = result.stderr.splitlines()
    assert error.startswith("error: data/bss: cannot be written")


def test_a_clock_that_is_wrong_by_half_a_century_changes_nothing(project):
    if shutil.which("faketime") is None:
        pytest.skip("faketime is not installed")
    before = contents(project / "data/bss")
    shutil.rmtree(project / ".work")
    command = ["faketime", "-f", "@1970-01-01 00:00:10", sys.executable, "-m", "stages.attack"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "(6 computed, 0 reused)" in result.stdout
    assert contents(project / "data/bss") == before


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_students_train_from_the_dataset_that_they_began_with(project):
    """Even when another one takes its place meanwhile, and its seeds are told from those of the other."""
    changes = {"teacher.network": "resnet8w2", "methods": ["original", "bss"]}
    write_params(project / "params.yaml", changes | {"attack.seed": 7})
    succeed(fork_stage(project, "attack", "--out", "data/other"))
    write_params(project / "params.yaml", changes | {"training.epochs": 40})
    process = fork_stage(project, "student", "--all")
    wait_for(lambda: list(project.glob(".work/fits/*/curve.json")), process)
    (project / "data/bss").rename(project / "data/before")
    (project / "data/other").rename(project / "data/bss")
    assert "resnet8w2-bss: 2 seeds (2 trained" in succeed(process)[0]
    assert "resnet8w2-bss: 2 seeds (2 trained" in succeed(fork_stage(project, "student", "--all"))[0]
    shutil.rmtree(project / "data/bss")
    (project / "data/before").rename(project / "data/bss")
    assert "resnet8w2-bss: 2 seeds (0 trained" in succeed(fork_stage(project, "student", "--all"))[0]


def test_two_runs_at_once_make_every_shard_once(project):
    before = contents(project / "data/bss")
    shutil.rmtree(project / ".work")
    both = [fork_stage(project, "attack") for _ in range(2)]
    first, second = sorted((succeed(process) for process in both), key=lambda output: output[1])
    assert first[1] == ""
    assert ".work/shards.lock is held by process" in second[1]
    assert "(6 computed, 0 reused)" in first[0]
    assert "(0 computed, 6 reused)" in second[0]
    assert contents(project / "data/bss") == before


def test_a_student_trains_while_the_attack_publishes(project):
    """Readers see the old dataset, the new one, or say that there is none."""
    processes = [fork_stage(project, "attack") for _ in range(3)]
    results = [finish(fork_stage(project, *BSS)) for _ in range(3)]
    for process in processes:
        succeed(process)
    for code, _, stderr in results:
        assert code == 0 or stderr.startswith("error: data/bss")


@pytest.fixture(scope="module")
def repository(prepared, tmp_path_factory):
    """The prepared folder as a DVC repository, with the project's own code."""
    directory = tmp_path_factory.mktemp("repository") / "project"
    shutil.copytree(prepared, directory, ignore=shutil.ignore_patterns("bss", ".work"))
    for name in ("pipeline", "stages"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", directory)
    for name in ("raw", "code"):
        (directory / "data" / name).mkdir()
    subprocess.run(["git", "init", "-q"], cwd=directory, check=True)
    subprocess.run([dvc(), "init", "-q"], cwd=directory, check=True)
    return directory


def dvc():
    return os.path.join(os.path.dirname(sys.executable), "dvc")


def start_repro(directory):
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    return subprocess.Popen(
        [dvc(), "repro", "--single-item", "attack"],
        cwd=directory,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(directory)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_a_killed_dvc_with_an_orphan_that_goes_on(repository, prepared):
    write_params(repository / "params.yaml", {"teacher.network": "resnet8w2", "attack.views": VIEWS})
    first = start_repro(repository)
    wait_for(lambda: list((repository / ".work/shards").rglob("*.sha256")), first)
    orphans = psutil.Process(first.pid).children(recursive=True)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert any(orphan.is_running() for orphan in orphans)
    second = start_repro(repository)
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 0, output
    _, alive = psutil.wait_procs(orphans, timeout=60)
    assert not alive
    assert find_problems(repository / "data/bss", read_manifest(repository / "data/bss")) == []
    for path in (prepared / "data/bss").glob("*.h5"):
        assert (repository / "data/bss" / path.name).read_bytes() == path.read_bytes()
    status = subprocess.run([dvc(), "status", "attack"], cwd=repository, text=True, capture_output=True)
    assert "up to date" in status.stdout


@pytest.mark.parametrize("how", ["made writable", "by the superuser"])
def test_a_shard_that_is_edited_where_dvc_shares_it_is_made_again_everywhere(repository, how):
    write_params(repository / "params.yaml", {"teacher.network": "resnet8w2"})
    command([dvc(), "config", "cache.type", "hardlink,reflink,copy"], repository)
    for kept in (".dvc/cache", ".work/shards", "data/bss"):  # of other tests, perhaps as copies
        shutil.rmtree(repository / kept, ignore_errors=True)
    command([dvc(), "repro", "--single-item", "attack"], repository)
    published = repository / "data/bss"
    (stored,) = (repository / ".work/shards").rglob(SHARD)
    before, path = contents(published), published / SHARD
    assert path.samefile(stored)
    assert path.stat().st_nlink == 3  # the third is in DVC's cache
    path.chmod(0o644)
    flip_bit(path, path.stat().st_size // 2)
    if how == "by the superuser":  # DVC takes what is read-only in its cache as whole, and restores it
        path.chmod(0o444)
        doctor = command([sys.executable, "-m", "stages.doctor", "--dvc"], repository)
        assert f"data/bss/{SHARD} was changed since it was made: python -m stages.attack" in doctor
        assert "(1 computed, 5 reused)" in command([sys.executable, "-m", "stages.attack"], repository)
    command([dvc(), "repro", "--single-item", "attack"], repository)
    assert contents(published) == before
    (stored,) = (repository / ".work/shards").rglob(SHARD)
    assert path.samefile(stored)
    assert path.stat().st_nlink == 3
    assert command([sys.executable, "-m", "stages.doctor", "--dvc"], repository) == ""


def command(arguments, directory):
    """Standard output of a command that must end well."""
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(directory)}
    ended = subprocess.run(arguments, cwd=directory, env=environment, text=True, capture_output=True, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


# ----------------------------------------------------------------------------------------------------------------------
# Workers of a cluster


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_every_number_of_workers_gives_the_same_bytes(project, workers):
    before = contents(project / "data/bss")
    shutil.rmtree(project / ".work")
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "runtime.workers": workers})
    assert "(6 computed, 0 reused)" in succeed(fork_stage(project, "attack"))[0]
    assert contents(project / "data/bss") == before
    shutil.rmtree(project / ".work")
    stdout, stderr = succeed(start_stage(project, "attack", "--scheduler", workers))
    assert "(6 computed, 0 reused)" in stdout
    assert f"{workers} workers, dashboard http://" in stderr
    assert contents(project / "data/bss") == before


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_number_of_threads_gives_the_same_bytes(project, threads):
    before = contents(project / "data/bss")
    shutil.rmtree(project / ".work")
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "runtime.threads": threads})
    succeed(start_stage(project, "attack"))
    assert contents(project / "data/bss") == before


def catches_interrupts(process):
    """Whether a process has its own way with Ctrl-C at this moment."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) & (1 << signal.SIGINT - 1))


def wait_for_our_code(process):
    """Wait until Python, which has a traceback for Ctrl-C, has started, and the project's first lines have run."""
    while not catches_interrupts(process):
        time.sleep(0.001)
    while catches_interrupts(process):
        time.sleep(0.001)


@pytest.mark.parametrize("seconds", [0, 0.3, 0.7, 1.2, 2.0])
def test_an_interrupt_while_a_command_starts_shows_no_traceback(project, seconds):
    process = start_stage(project, "attack", "--plan")
    wait_for_our_code(process)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    code, _, stderr = finish(process)
    assert code in (0, 130, -signal.SIGINT)
    assert "Traceback" not in stderr


def test_an_interrupt_where_python_drops_errors_is_not_lost(tmp_path):
    code = """
import click, gc, os, signal, time, weakref
from stages.cli import errors_in_one_line

class Node:
    pass

@click.command()
@errors_in_one_line
def main():
    nodes = [Node() for _ in range(3)]
    references = [weakref.ref(node, lambda _: os.kill(os.getpid(), signal.SIGINT)) for node in nodes]
    for node in nodes:
        node.itself = node
    del node, nodes
    gc.collect()
    time.sleep(60)

main()
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert result.returncode == 130
    assert result.stderr.split() == INTERRUPTED.split()


@pytest.mark.parametrize("seconds", [0.3, 1.5, 3.0])
def test_an_interrupt_while_a_cluster_starts_shows_no_traceback(project, seconds):
    shutil.rmtree(project / ".work")
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "attack.views": 1000})
    process = fork_stage(project, "attack", "--scheduler", 2)
    time.sleep(seconds)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    code, _, stderr = finish(process)
    assert code == 130
    assert stderr.splitlines()[-1] == INTERRUPTED
    assert "Traceback" not in stderr
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_a_killed_first_process_of_several_leaves_no_other(project):
    write_params(project / "params.yaml", {"runtime.devices": 2, "training.epochs": 10_000})
    process = start_stage(project, "student", "--student", "resnet8w2", "--method", "original")
    wait_for(lambda: psutil.Process(process.pid).children(), process)
    family = psutil.Process(process.pid).children(recursive=True)
    time.sleep(random.Random(0).uniform(1, 5))
    process.kill()
    process.communicate()
    assert psutil.wait_procs(family, timeout=10)[1] == []


def workers_of(process):
    """The processes of a local cluster that do the work."""
    found = [child for child in psutil.Process(process.pid).children(recursive=True) if child.is_running()]
    return [child for child in found if "spawn_main" in " ".join(child.cmdline())]


def test_a_killed_worker_costs_its_shard_only(project, tmp_path):
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "attack.views": VIEWS})
    expected, _ = undisturbed(project, tmp_path / "undisturbed", ("attack",), "data/bss")
    process = start_stage(project, "attack", "--scheduler", 2)
    wait_for(lambda: len(list((project / ".work/shards").rglob("*.sha256"))) > 12, process)
    victims = workers_of(process)
    assert len(victims) == 2
    victims[0].kill()
    stdout, _ = succeed(process)
    assert f"({3 * VIEWS - 6} computed, 6 reused)" in stdout
    assert contents_below(project / "data/bss") == expected["data/bss"]


def test_an_interrupted_cluster_is_gone_and_its_shards_are_kept(project):
    before = contents(project / "data/bss")
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "attack.views": 1000})
    process = start_stage(project, "attack", "--scheduler", 2)
    wait_for(lambda: len(list((project / ".work/shards").rglob("*.sha256"))) > 12, process)
    workers = workers_of(process)
    process.send_signal(signal.SIGINT)
    code, stdout, stderr = finish(process)
    assert (code, stdout) == (130, ""), stderr
    assert stderr.splitlines()[-1] == INTERRUPTED
    assert "Traceback" not in stderr
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() for worker in workers)
    assert contents(project / "data/bss") == before


def test_students_on_workers_are_those_of_single_runs_and_are_not_trained_again(project):
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "methods": ["original", "bss"]})
    stdout, _ = succeed(fork_stage(project, "student", "--all"))
    assert stdout.count("2 seeds (2 trained, 0 reused)") == 2
    expected = contents(project / "models/students", project / "reports/students")
    shutil.rmtree(project / ".work")
    shutil.rmtree(project / "models/students")
    stdout, _ = succeed(start_stage(project, "student", "--all", "--scheduler", 2))
    assert stdout.count("2 seeds (2 trained, 0 reused)") == 2
    assert contents(project / "models/students", project / "reports/students") == expected
    assert "2 seeds (0 trained, 2 reused)" in succeed(fork_stage(project, *BSS))[0]
    assert contents(project / "models/students", project / "reports/students") == expected


@pytest.fixture
def two_hosts(tmp_path):
    """A scheduler and two workers that share no folder but the project's: (address, processes)."""
    started = []

    def start(name, *command):
        (tmp_path / name).mkdir()
        process = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli." + command[0], *command[1:]],
            cwd=tmp_path / name,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    file = tmp_path / "scheduler.json"
    scheduler = start("scheduler", "dask_scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
    wait_for(lambda: file.exists() and file.read_text().endswith("}"), scheduler)
    address = json.loads(file.read_text())["address"]
    for name in ("host-1", "host-2"):
        start(name, "dask_worker", address, "--nthreads", "1", "--no-dashboard", "--no-nanny")
    yield address, started
    for process in started:
        process.kill()
        process.communicate()


def test_scheduler_and_workers_on_other_hosts(project, two_hosts):
    address, (_, *workers) = two_hosts
    before = contents(project / "data/bss")
    shutil.rmtree(project / ".work")
    stdout, _ = succeed(start_stage(project, "attack", "--scheduler", address))
    assert "(6 computed, 0 reused)" in stdout
    assert contents(project / "data/bss") == before

    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "methods": ["bss"]})
    succeed(start_stage(project, "student", "--all", "--scheduler", address))
    on_workers = load_file(project / "models/students/resnet8w2-bss/seed-1.safetensors")
    shutil.rmtree(project / ".work/fits")
    succeed(fork_stage(project, *BSS))
    here = load_file(project / "models/students/resnet8w2-bss/seed-1.safetensors")
    assert all((here[name] == on_workers[name]).all() for name in here)

    # The same workers, after the dataset has changed: what they have read before does not count.
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "methods": ["bss"], "attack.seed": 7})
    succeed(fork_stage(project, "attack"))
    assert "(2 trained, 0 reused)" in succeed(start_stage(project, "student", "--all", "--scheduler", address))[0]

    # One of them dies for good.
    shutil.rmtree(project / ".work/shards")
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "attack.views": VIEWS})
    process = start_stage(project, "attack", "--scheduler", address)
    wait_for(lambda: len(list((project / ".work/shards").rglob("*.sha256"))) > 6, process)
    workers[0].kill()
    assert f"({3 * VIEWS} computed, 0 reused)" in succeed(process)[0]


def test_a_scheduler_that_goes_away_is_one_line(project, two_hosts):
    address, (scheduler, *_) = two_hosts
    before = contents(project / "data/bss")
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "attack.views": 1000})
    process = start_stage(project, "attack", "--scheduler", address)
    wait_for(lambda: len(list((project / ".work/shards").rglob("*.sha256"))) > 12, process)
    scheduler.kill()
    code, stdout, stderr = finish(process)
    assert (code, stdout) == (1, ""), stderr
    assert stderr.splitlines()[-1] == "error: the scheduler is gone: run again, finished work is kept"
    assert "Traceback" not in stderr
    assert contents(project / "data/bss") == before


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("0", "at least one worker is needed"),
        ("tcp://127.0.0.1:9", "cannot be started or reached"),
        ("nonsense://x", "cannot be started or reached"),
    ],
)
def test_a_cluster_that_cannot_be_reached_is_one_line(project, monkeypatch, scheduler, message):
    monkeypatch.setattr("pipeline.machine.cluster.CONNECT_SECONDS", 1)
    shutil.rmtree(project / ".work")
    fail(fork_stage(project, "attack", "--scheduler", scheduler), f"--scheduler {scheduler}", message)
