"""The environment that `make` makes: whatever goes wrong is told in one line, and the second try works."""

import os
import shutil
import signal
import subprocess
import time

import pytest

from pipeline.core.provenance import ROOT

# A Python that makes environments out of copies of itself, and notes what it installs; FAULT says what goes wrong.
PYTHON = """#!/bin/sh
fault=${FAULT-}
case "$*" in
-c*platform*) [ "$fault" = broken ] && { echo "cannot open shared object" >&2; exit 127; }
    [ "$fault" = old ] && echo 3.9.2 False || echo 3.11.2 True ;;
-c*) ;;
"-m venv .venv")
    mkdir -p .venv/bin
    cp "$REAL" .venv/bin/python
    [ "$fault" = venv-killed ] && exec sleep 60
    [ "$fault" = ensurepip ] && { printf 'The virtual environment was not created successfully because ensurepip is not
available.  On Debian/Ubuntu systems, you need to install the python3-venv package.\\n'; exit 1; }
    [ "$fault" = venv-full ] && { echo "Error: [Errno 28] No space left on device" >&2; exit 1; }
    case $PWD in
    *" "*) printf "#!/bin/sh\\n'''exec' \\"%s/.venv/bin/python\\" \\"\\$0\\"\\n' '''\\n" "$PWD" >.venv/bin/pip ;;
    *) printf '#!%s/.venv/bin/python\\n' "$PWD" >.venv/bin/pip ;;
    esac ;;
"-m pip --version") ;;
"-m pip install"*)
    echo "$*" >>.venv/calls
    [ "$fault" = pip-killed ] && exec sleep 60
    [ "$fault" = pip-full ] && { echo "ERROR: No space left on device" >&2; exit 1; }
    touch .venv/packages ;;
*) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""
BAD_PIP = "error: packages cannot be installed (pip says why above)"
FAULTS = {
    "broken": "error: python3 does not run (cannot open shared object): name another Python: make PYTHON=",
    "old": "error: python3 is Python 3.9.2, but 3.11 or later is needed: install it, and name it: make PYTHON=",
    "ensurepip": "error: python3 (Python 3.11.2) cannot make environments: install its package for them "
    "(Debian, Ubuntu: apt install python3.11-venv), or name another Python: make PYTHON=",
    "venv-full": "error: .venv cannot be made: Error: [Errno 28] No space left on device",
    "pip-full": BAD_PIP,
}


@pytest.fixture(params=["project", "my project"])
def project(tmp_path, request):
    folder = tmp_path / request.param
    (folder / ".ci").mkdir(parents=True)
    for name in ("Makefile", ".ci/environment"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        (folder / name).write_text("first\n")
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin/python3"
    fake.write_text(PYTHON)
    fake.chmod(0o755)
    return folder


def start(folder, *arguments, fault="", path=()):
    fakes = folder.parent / "bin"
    paths = [*map(str, path), str(fakes), "/usr/bin", "/bin"]
    return subprocess.Popen(
        ["make", "environment", *arguments],
        cwd=folder,
        env={"PATH": ":".join(paths), "REAL": str(fakes / "python3"), "FAULT": fault},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def make(folder, *arguments, **options):
    """(exit code, lines on standard error but make's own)."""
    process = start(folder, *arguments, **options)
    stdout, stderr = process.communicate(timeout=30)
    assert stdout == ""
    return process.returncode, [line for line in stderr.splitlines() if not line.startswith("make: ")]


def is_made(folder):
    return (folder / ".venv/packages").is_file() and not (folder / ".venv/.installing").exists()


def calls(folder):
    """How often something was installed into this very environment."""
    return len((folder / ".venv/calls").read_text().splitlines())


def test_an_environment_is_made_once_and_again_when_its_needs_change(project):
    assert make(project) == (0, [])
    assert is_made(project)
    assert make(project) == (0, [])
    assert calls(project) == 1
    (project / "constraints.txt").write_text("second\n")
    assert make(project) == (0, [])
    assert make(project) == (0, [])
    assert calls(project) == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_is_told_and_the_second_try_works(project, fault):
    for _ in range(2):  # nor does the first one change what the second one says
        code, lines = make(project, fault=fault)
        assert code != 0
        assert lines[-1].startswith(FAULTS[fault])
        assert len(lines) == (2 if fault == "pip-full" else 1)
        assert not is_made(project)
    assert make(project) == (0, [])
    assert is_made(project)
    assert calls(project) == 1


def test_a_missing_python_is_told(project):
    code, lines = make(project, "PYTHON=python3.99")
    assert code != 0
    assert lines == [
        "error: there is no python3.99: install Python 3.11 or 3.12, or name one: make PYTHON=/path/to/python3"
    ]


@pytest.mark.parametrize("fault", ["venv-killed", "pip-killed"])
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_what_is_interrupted_is_made_anew(project, fault, end):
    process = start(project, fault=fault)
    begun = project / (".venv/bin/python" if fault == "venv-killed" else ".venv/calls")
    deadline = time.monotonic() + 20
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, end)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert make(project) == (0, [])
    assert is_made(project)
    assert calls(project) == 1


def test_a_failure_does_not_take_the_mark_of_an_environment_for_its_own(project):
    assert make(project) == (0, [])
    (project / "setup.cfg").write_text("second\n")
    assert make(project, fault="pip-full")[0] != 0
    assert make(project) == (0, [])
    assert calls(project) == 1  # in one made anew


def gone(folder):
    (folder / ".venv/bin/python").unlink()
    (folder / ".venv/bin/python").symlink_to("/nowhere/python3")


def upgraded(folder):
    (folder / ".venv/bin/python").write_text("#!/bin/sh\ncase $* in '-m pip'*) exit 1 ;; esac\n")


def damaged(folder):
    for name in ("python", "python3"):  # the second is the first one of its name on the path of make
        (folder / ".venv/bin" / name).write_text("#!/bin/sh\nexit 127\n")
        (folder / ".venv/bin" / name).chmod(0o755)


def too_old(folder):
    (folder / ".venv/bin/python").write_text("#!/bin/sh\ncase $* in -c*) exit 1 ;; esac\n")


def without_pip(folder):
    (folder / ".venv/bin/pip").unlink()


@pytest.mark.parametrize("spoil", [gone, upgraded, damaged, too_old, without_pip])
def test_an_environment_of_another_python_is_made_anew(project, spoil):
    assert make(project) == (0, [])
    (project / ".venv/old").touch()
    spoil(project)
    assert make(project) == (0, [])
    assert is_made(project)
    assert not (project / ".venv/old").exists()


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("how", ["moved", "copied"])
def test_an_environment_of_another_folder_is_made_anew(project, how, activated):
    assert make(project) == (0, [])
    (project / ".venv/old").touch()
    other = project.with_name("another folder")
    (shutil.move if how == "moved" else shutil.copytree)(project, other)
    assert make(other, path=[other / ".venv/bin"] if activated else []) == (0, [])
    assert is_made(other)
    assert not (other / ".venv/old").exists()
    if how == "copied":
        assert make(project) == (0, [])
        assert calls(project) == 1


def test_an_environment_made_by_hand_is_used(project):
    assert make(project) == (0, [])
    (project / ".venv/.installed").write_text("")
    (project / ".venv/mine").touch()
    assert make(project) == (0, [])
    assert (project / ".venv/mine").exists()


def test_a_folder_by_another_name_is_the_same(project):
    assert make(project) == (0, [])
    link = project.with_name("link")
    link.symlink_to(project)
    assert make(link) == (0, [])
    assert calls(project) == 1
