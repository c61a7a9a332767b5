"""File systems without locks, and files that others have locked: nothing here is changed in its place."""

import errno
import fcntl

import filelock._unix
import pytest

from pipeline.core.files import read_hdf5
from pipeline.core.hdf5 import written_hdf5
from pipeline.images.prepared import read_prepared
from pipeline.shards.reader import BoundaryShards
from tests.support.files import contents, make_project, run_stage


@pytest.fixture
def project(tmp_path, monkeypatch):
    changes = {"attack.views": 1, "methods": ["hinton"], "seeds": 1, "training.epochs": 1}
    make_project(tmp_path, changes)
    monkeypatch.chdir(tmp_path)
    assert run_stage("attack").exit_code == 0
    return tmp_path


def test_files_that_another_program_has_locked_are_read(project):
    # Each once: the store's shards are those of data/bss.
    paths = {path.stat().st_ino: path for path in project.rglob("*.h5")}.values()
    files = [open(path, "r+b") for path in paths]  # noqa: SIM115 (closed below)
    for file in files:
        fcntl.flock(file, fcntl.LOCK_EX)
    assert len(files) > 5
    try:
        assert len(read_prepared(project / "data/prepared/train.h5").labels) == 64
        assert len(BoundaryShards(project / "data/bss")) == 64
        result = run_stage("student", "--all")
        assert result.exit_code == 0, result.stderr
        assert run_stage("shards", "verify", "data/bss").exit_code == 0
    finally:
        for file in files:
            file.close()


def test_a_file_is_locked_neither_while_it_is_read_nor_while_it_is_written(tmp_path):
    path = tmp_path / "some.h5"
    with written_hdf5(path) as file:
        file["number"] = 3
    with read_hdf5(path) as file, open(path, "r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert file["number"][()] == 3


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_commands_work_and_say_so(project, monkeypatch, number):
    def refused(descriptor, operation):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(filelock._unix.fcntl, "flock", refused)
    before = contents(project / "data")
    result = run_stage("attack")
    assert result.exit_code == 0, result.output
    assert "shards.lock: this file system has no locks" in result.stderr
    assert contents(project / "data") == before
