"""Files that are whole or absent, the private store and its lock, fingerprints."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.errors import StoreError
from pipeline.core.files import (
    atomic_directory,
    atomic_path,
    copy_file,
    file_digest,
    link_file,
    write_atomically,
    write_json,
)
from pipeline.core.hdf5 import written_hdf5
from pipeline.core.store import Store, lock
from tests.support.files import ROOT, flip_bit, on_full_disk, truncate

HOLD = """
import sys
from functools import partial
from pathlib import Path
from pipeline.core.store import lock
with lock(Path(sys.argv[1]), partial(print, flush=True)):
    print("held", flush=True)
    sys.stdin.read()
"""


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_write_makes_nested_folders_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a/b/c.txt"
    write_atomically(path, "first")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert names(path.parent) == ["c.txt"]


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
    assert path.read_text() == "new"


def test_an_error_while_writing_keeps_the_old_file_and_removes_the_temporary_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_json_is_sorted_and_refuses_nan(tmp_path):
    path = tmp_path / "values.json"
    write_json(path, {"b": 1, "a": [None, 0.5]})
    assert path.read_text() == '{\n  "a": [\n    null,\n    0.5\n  ],\n  "b": 1\n}\n'
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert path.read_bytes() == before


def test_a_directory_replaces_the_old_one_as_a_whole(tmp_path):
    path = tmp_path / "deep/out"
    with atomic_directory(path, "*") as temporary:
        (temporary / "stale").write_text("1")
        (temporary / "kept").write_text("1")
    with atomic_directory(path, "*") as temporary:
        (temporary / "kept").write_text("2")
        assert names(path) == ["kept", "stale"]
    assert names(path) == ["kept"]
    assert (path / "kept").read_text() == "2"
    assert names(path.parent) == ["out"]


def test_an_error_while_filling_a_directory_keeps_the_old_one(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    (path / "file").write_text("old")

    def fail():
        with atomic_directory(path, "*") as temporary:
            (temporary / "file").write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (path / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def write_directory(path):
    with atomic_directory(path, "*") as temporary:
        (temporary / "file").write_text("1")


def hold_lock(path):
    with lock(path, print):
        pass


@pytest.mark.parametrize("write", [lambda path: write_atomically(path, "1"), write_directory], ids=["file", "folder"])
def test_no_permission_is_an_error_that_names_the_path(write):
    path = Path("/sys/boundary-distillation")  # where not even root can create anything
    with pytest.raises(StoreError, match=f"^{path}: cannot be written: ") as caught:
        write(path)
    assert "\n" not in str(caught.value)


IN_THE_WAY = {
    "file": lambda path: write_atomically(path, "1"),
    "folder": write_directory,
    "lock": hold_lock,
}


@pytest.mark.parametrize("write", IN_THE_WAY)
def test_a_file_in_the_place_of_the_folder_is_an_error_that_names_the_path(tmp_path, write):
    (tmp_path / "file").write_text("old")
    with pytest.raises(StoreError, match=re.escape(str(tmp_path / "file"))):
        IN_THE_WAY[write](tmp_path / "file/out")
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("write", IN_THE_WAY)
def test_a_file_further_up_is_an_error_that_names_the_path(tmp_path, write):
    (tmp_path / "file").write_text("old")
    with pytest.raises(StoreError, match=re.escape(str(tmp_path / "file"))):
        IN_THE_WAY[write](tmp_path / "file/deeper/out")
    assert (tmp_path / "file").read_text() == "old"


def save_columns(path):
    with written_hdf5(path) as file:
        file["column"] = np.zeros(10_000)


def copy_large_file(path):
    large = path.with_name("large")
    copy_file(large, path)


WRITERS = {
    "bytes": lambda path: write_atomically(path, b"1" * 30_000),
    "hdf5": save_columns,
    "copy": copy_large_file,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_that_names_the_path_and_keeps_the_old_file(tmp_path, writer):
    path = tmp_path / "out"
    path.write_text("old")
    (tmp_path / "large").write_bytes(bytes(30_000))
    error = on_full_disk(lambda: WRITERS[writer](path))
    assert isinstance(error, StoreError), repr(error)
    assert str(error).startswith(f"{path}: no space to write it (")
    assert "\n" not in str(error)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["large", "out"]


def test_a_full_disk_while_filling_a_directory_is_one_line_and_keeps_the_old_directory(tmp_path):
    path = tmp_path / "out"
    write_directory(path)

    def fill():
        with atomic_directory(path, "*") as temporary:
            (temporary / "file").write_bytes(bytes(30_000))

    error = on_full_disk(fill)
    assert isinstance(error, StoreError), repr(error)
    assert str(path) in str(error)
    assert (path / "file").read_text() == "1"
    assert names(tmp_path) == ["out"]


def test_copies_are_whole_and_independent(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 9000)
    copy_file(source, tmp_path / "deep/copy")
    assert (tmp_path / "deep/copy").read_bytes() == source.read_bytes()
    flip_bit(source, 5)
    assert (tmp_path / "deep/copy").read_bytes() != source.read_bytes()


def test_a_link_is_the_same_file_and_takes_the_place_of_another(tmp_path):
    source, target = tmp_path / "source", tmp_path / "deep/target"
    source.write_bytes(b"content")
    link_file(source, target)
    assert target.samefile(source)
    other = tmp_path / "other"
    other.write_bytes(b"other")
    target.chmod(0o444)
    link_file(other, target)
    assert target.samefile(other)
    assert source.read_bytes() == b"content"
    (tmp_path / "symbolic").symlink_to(source)
    link_file(tmp_path / "symbolic", target)
    assert not target.is_symlink()
    assert target.samefile(source)


@pytest.mark.parametrize("reason", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_where_files_cannot_be_linked_they_are_copied(tmp_path, monkeypatch, reason):
    def refuse(*arguments):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "source").write_bytes(b"content")
    link_file(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"content"
    assert not (tmp_path / "target").samefile(tmp_path / "source")


def test_a_source_that_cannot_be_linked_or_read_is_named(tmp_path):
    with pytest.raises(StoreError, match="source: cannot be read: No such file"):
        link_file(tmp_path / "source", tmp_path / "target")
    assert names(tmp_path) == []


def test_file_digest_is_sha256(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    # The example of FIPS 180-2, appendix B.1.
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def sealed(store, name, content=b"content"):
    write_atomically(store.path(name), content)
    return store.seal(name)


def test_store_finds_what_was_sealed(tmp_path):
    store = Store(tmp_path / "store")
    path = sealed(store, "key/file")
    assert store.find("key/file") == path
    assert path.read_bytes() == b"content"


DAMAGES = {
    "bit flipped": lambda path: flip_bit(path, 3),
    "truncated": lambda path: truncate(path, 1),
    "digest truncated": lambda path: path.with_name("file.sha256").write_text(file_digest(path)[:-1]),
    "digest empty": lambda path: path.with_name("file.sha256").write_bytes(b""),
    "digest not text": lambda path: path.with_name("file.sha256").write_bytes(b"\xff\xfe"),
    "digest a folder": lambda path: (path.with_name("file.sha256").unlink(), path.with_name("file.sha256").mkdir()),
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "inside").touch()),
    "a folder alone": lambda path: (path.unlink(), path.mkdir(), path.with_name("file.sha256").unlink()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_store_removes_what_is_not_as_it_was_sealed(tmp_path, damage):
    store = Store(tmp_path / "store")
    path = sealed(store, "key/file")
    DAMAGES[damage](path)
    assert store.find("key/file") is None
    assert names(path.parent) == []
    assert sealed(store, "key/file") == store.find("key/file")


def sealed_before(store, name):
    """A sealed file that was written well before its record."""
    write_atomically(store.path(name), b"content")
    os.utime(store.path(name), ns=(10**18, 10**18))
    return store.seal(name, {"fact": 1})


def test_a_file_is_known_again_without_being_read(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    path = sealed_before(store, "key/file")
    path.chmod(0o444)  # as DVC does
    os.link(path, tmp_path / "second name")
    monkeypatch.setattr("pipeline.core.store.file_digest", lambda path: pytest.fail("was read"))
    record = store.unchanged("key/file")
    assert record.sha256 == hashlib.sha256(b"content").hexdigest()
    assert (record.size, record.facts) == (7, {"fact": 1})


def written_within_the_tick(path):
    time_ns = path.stat().st_mtime_ns
    os.utime(path.with_name("file.sha256"), ns=(time_ns, time_ns))


def replaced_at_the_same_time(path):
    time_ns = path.stat().st_mtime_ns
    write_atomically(path, b"CONTENT")
    os.utime(path, ns=(time_ns, time_ns))


CHANGES = {
    "bit flipped": lambda path: flip_bit(path, 3),
    "touched": lambda path: path.touch(),
    "replaced at the same time": replaced_at_the_same_time,
    "copied": lambda path: write_atomically(path, path.read_bytes()),
    "longer": lambda path: path.write_bytes(b"content and more"),
    "written within the tick of its record": written_within_the_tick,
    "removed": Path.unlink,
    "record of the digest alone": lambda path: path.with_name("file.sha256").write_text(file_digest(path)),
    "record removed": lambda path: path.with_name("file.sha256").unlink(),
    "record no JSON": lambda path: path.with_name("file.sha256").write_text(file_digest(path) + "\n{"),
    "record of other JSON": lambda path: path.with_name("file.sha256").write_text(file_digest(path) + "\n[1]\n"),
    "record of another file": lambda path: shutil.copy(
        sealed_before(Store(path.parent.parent), "key/other").with_name("other.sha256"), path.with_name("file.sha256")
    ),
}
SAME_CONTENT = {"touched", "copied", "written within the tick of its record", "record of the digest alone"}
SAME_CONTENT |= {"record no JSON", "record of other JSON", "record of another file"}


@pytest.mark.parametrize("change", CHANGES)
def test_what_may_have_changed_is_digested_and_recorded_anew_or_forgotten(tmp_path, change):
    store = Store(tmp_path / "store")
    path = sealed_before(store, "key/file")
    CHANGES[change](path)
    assert store.unchanged("key/file") is None
    record = store.renewed("key/file", lambda path: {"size": path.stat().st_size})
    if change in SAME_CONTENT:
        assert (record.sha256, record.facts) == (hashlib.sha256(b"content").hexdigest(), {"size": 7})
        os.utime(path.with_name("file.sha256"))
        assert store.unchanged("key/file") == record
    else:
        assert record is None
        assert store.find("key/file") is None


def test_what_is_not_what_its_name_says_is_forgotten(tmp_path):
    def refuse(path):
        raise StoreError("another file")

    store = Store(tmp_path / "store")
    path = sealed_before(store, "key/file")
    assert store.renewed("key/file", refuse) is None
    assert names(path.parent) == []


def test_a_damaged_file_is_no_longer_what_dvc_trusts(tmp_path):
    store = Store(tmp_path / "store")
    path = sealed_before(store, "key/file")
    cached = tmp_path / "cached"
    os.link(path, cached)
    flip_bit(path, 3)
    path.chmod(0o444)
    assert store.find("key/file") is None
    assert cached.stat().st_mode & 0o777 != 0o444


def test_store_lacks_what_was_never_made_or_never_sealed(tmp_path):
    store = Store(tmp_path / "store")
    assert store.find("key/file") is None
    write_atomically(store.path("key/file"), b"content")
    assert store.find("key/file") is None
    assert store.seal("key/file") == store.find("key/file")


@pytest.mark.parametrize("name", ["file", "file.sha256"])
def test_store_lacks_what_lost_its_content_or_its_digest(tmp_path, name):
    store = Store(tmp_path / "store")
    sealed(store, "key/file").with_name(name).unlink()
    assert store.find("key/file") is None
    assert sealed(store, "key/file") == store.find("key/file")


def test_a_link_that_leads_to_itself_is_replaced(tmp_path):
    store = Store(tmp_path / "store")
    path = sealed(store, "key/file")
    path.unlink()
    path.symlink_to(path)
    assert store.find("key/file") is None
    assert sealed(store, "key/file") == store.find("key/file")


def test_prune_keeps_named_files_and_removes_all_others(tmp_path):
    store = Store(tmp_path / "store")
    for name in ("a/1", "a/2", "b/1"):
        sealed(store, name)
    (store.path("a/.3.0123abcd.tmp")).write_bytes(b"left behind by a killed process")
    store.path("b/1").unlink()  # its digest is left
    assert store.prune(["a/1"]) == 3
    assert [path.relative_to(store.root).as_posix() for path in sorted(store.root.rglob("*"))] == [
        "a",
        "a/1",
        "a/1.sha256",
    ]
    assert store.find("a/1") is not None
    assert store.prune(["a/1"]) == 0


@pytest.fixture
def hold(tmp_path):
    """Starts processes that hold, or wait for, the lock until their standard input ends."""
    started = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "work.lock")],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_a_second_process_waits_and_says_for_whom(tmp_path, hold):
    first = hold()
    assert first.stdout.readline() == "held\n"
    second = hold()
    assert second.stdout.readline() == f"{tmp_path}/work.lock is held by process {first.pid}: waiting for it\n"
    first.stdin.close()
    assert second.stdout.readline() == "held\n"


@pytest.mark.parametrize("name", ["work.lock", "work.pid"])
def test_a_lock_that_cannot_be_written_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / name).mkdir()
    with (
        pytest.raises(StoreError, match=f"{name}: cannot be written: Is a directory"),
        lock(tmp_path / "work.lock", print),
    ):
        pytest.fail("the lock is not held")


def test_the_lock_of_a_killed_process_is_free(tmp_path, hold):
    owner = hold()
    assert owner.stdout.readline() == "held\n"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    said = []
    with lock(tmp_path / "work.lock", said.append):
        pass
    assert said == []


def write_ten(directory, content="new"):
    with atomic_directory(directory, "*.txt") as temporary:
        for number in range(10):
            write_atomically(temporary / f"{number}.txt", content)


def test_a_directory_behind_a_link_is_replaced_where_it_is(tmp_path):
    (tmp_path / "large disk/out").mkdir(parents=True)
    (tmp_path / "out").symlink_to("large disk/out")
    for _ in range(2):
        write_ten(tmp_path / "out")
        assert (tmp_path / "out").is_symlink()
        assert len(names(tmp_path / "large disk/out")) == 10
        assert names(tmp_path) == ["large disk", "out"]
        assert names(tmp_path / "large disk") == ["out"]


UNUSABLE = {
    "a file": (lambda path: path.touch(), "is no folder"),
    "a pipe": (os.mkfifo, "is no folder"),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), "leads nowhere"),
    "a link to itself": (lambda path: path.symlink_to(path), "leads nowhere"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_is_no_directory_is_not_replaced(tmp_path, case):
    make, text = UNUSABLE[case]
    make(tmp_path / "out")
    for _ in range(2):
        with pytest.raises(StoreError, match=f"out: .*{text}"):
            write_ten(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_a_mount_point_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(StoreError, match="out: is a mount point"):
        write_ten(tmp_path / "out")


def test_the_old_directory_is_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    write_ten(tmp_path / "out", "old")

    def fail_to_move_new(source, target, do=os.rename):
        if ".new." in str(source):
            raise KeyboardInterrupt
        do(source, target)

    monkeypatch.setattr(os, "rename", fail_to_move_new)
    with pytest.raises(KeyboardInterrupt):
        write_ten(tmp_path / "out")
    assert (tmp_path / "out/3.txt").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_directory_of_a_lower_layer_of_overlayfs_is_replaced(tmp_path, monkeypatch, ends_well):
    write_ten(tmp_path / "out", "old")
    (tmp_path / "out/4.txt").unlink()
    lower = {(tmp_path / "out").stat().st_ino}

    def rename(source, target, do=os.rename):
        if os.stat(source).st_ino in lower:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source)
        if not ends_well and ".new." in str(source):
            raise KeyboardInterrupt
        do(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with contextlib.nullcontext() if ends_well else pytest.raises(KeyboardInterrupt):
        write_ten(tmp_path / "out")
    assert len(names(tmp_path / "out")) == (10 if ends_well else 9)
    assert (tmp_path / "out/3.txt").read_text() == ("new" if ends_well else "old")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("ends_well", [True, False])
def test_what_a_run_left_that_was_killed_between_two_renames_is_put_in_order(tmp_path, ends_well):
    write_ten(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.old.tmp")
    (tmp_path / ".out.new.tmp").mkdir()
    (tmp_path / ".out.new.tmp/3.txt").touch()
    with contextlib.suppress(ZeroDivisionError), atomic_directory(tmp_path / "out", "*.txt") as temporary:
        assert names(temporary) == []
        write_atomically(temporary / "3.txt", "new")
        if not ends_well:
            raise ZeroDivisionError
    assert (tmp_path / "out/3.txt").read_text() == ("new" if ends_well else "old")
    assert names(tmp_path) == ["out"]


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))

    def replace(source, target, do=os.replace):
        assert synced == [str(source)]
        do(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_source_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(StoreError, match="source: cannot be read: No such file"):
        copy_file(tmp_path / "source", tmp_path / "target")
    assert names(tmp_path) == []


def test_a_directory_with_somebody_elses_files_is_not_replaced(tmp_path):
    (tmp_path / "out/photos").mkdir(parents=True)
    (tmp_path / "out/seed-0.safetensors").touch()

    def replace():
        with atomic_directory(tmp_path / "out", "seed-*.safetensors"):
            pytest.fail("the folder is not ours")

    with pytest.raises(StoreError, match="out: holds 'photos', which is not written here: choose another folder"):
        replace()
    assert names(tmp_path / "out") == ["photos", "seed-0.safetensors"]
