"""Files that are whole or absent, the private store and its lock, fingerprints."""

import hashlib
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline import provenance
from pipeline.errors import StoreError
from pipeline.provenance import code_digest, fingerprint
from pipeline.storage import (
    Store,
    atomic_directory,
    atomic_path,
    copy_file,
    file_digest,
    lock,
    write_atomically,
    write_json,
    written_hdf5,
)
from tests.files import ROOT, flip_bit, on_full_disk, truncate

HOLD = """
import sys
from functools import partial
from pathlib import Path
from pipeline.storage import lock
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


def test_file_digest_is_sha256(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    # The example of FIPS 180-2, appendix B.1.
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_fingerprint_is_the_digest_of_sorted_json():
    expected = hashlib.sha256(b'[{"a": [1, 2.5], "b": null}, "x"]').hexdigest()
    assert fingerprint({"b": None, "a": (1, 2.5)}, "x") == expected


def test_fingerprint_tells_parts_types_and_order_apart():
    parts = [(), (1,), ("1",), (1.0,), (True,), (1, 2), (2, 1), ([1, 2],), ({"a": 1},), ({"a": 2},)]
    assert len({fingerprint(*each) for each in parts}) == len(parts)


def test_fingerprint_refuses_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint({"rate": float("nan")})


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package, from which code digests are taken."""
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path / "pipeline"


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


SAME = {
    "comment": lambda path: path.write_text("# why\n" + path.read_text() + "# more\n"),
    "module docstring": lambda path: edit(path, '"""Views: ', '"""Other views: '),
    "function docstring": lambda path: edit(path, '"""Draw crop offsets', '"""Draw the crop offsets'),
    "class docstring": lambda path: edit(path, '"""What was drawn', '"""What has been drawn'),
    "no docstring": lambda path: edit(path, '    """Independent sequences of random numbers under one seed."""\n', ""),
    "blank lines": lambda path: path.write_text(path.read_text().replace("\n\n", "\n\n\n")),
    "layout": lambda path: edit(path, "numbers[:, :2] * (2 * padding + 1)", "numbers[:, :2]*(\n    2*padding + 1)"),
}
OTHER = {
    "constant": lambda path: edit(path, "WORDS_PER_COUNTER = 4", "WORDS_PER_COUNTER = 8"),
    "operator": lambda path: edit(path, "< 0.5", "<= 0.5"),
    "text in code": lambda path: path.write_text(path.read_text() + "\nNAME = 'x'\n"),
}


@pytest.mark.parametrize("change", SAME)
def test_code_digest_ignores_what_does_nothing(package, change):
    before = code_digest("pipeline.views")
    source = (package / "views.py").read_text()
    SAME[change](package / "views.py")
    assert (package / "views.py").read_text() != source
    assert code_digest("pipeline.views") == before


@pytest.mark.parametrize("change", OTHER)
def test_code_digest_changes_with_the_code_of_a_module_and_of_what_it_imports(package, change):
    before = code_digest("pipeline.views"), code_digest("pipeline.attack"), code_digest("pipeline.similarity")
    OTHER[change](package / "views.py")
    after = code_digest("pipeline.views"), code_digest("pipeline.attack"), code_digest("pipeline.similarity")
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, False, True]


def test_code_digest_tells_modules_apart():
    assert code_digest("pipeline.status") != code_digest("pipeline.views")
    assert code_digest("pipeline.status", "pipeline.views") == code_digest("pipeline.views", "pipeline.status")


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
    "digest truncated": lambda path: truncate(path.with_name("file.sha256"), 1),
    "digest empty": lambda path: path.with_name("file.sha256").write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_store_removes_what_is_not_as_it_was_sealed(tmp_path, damage):
    store = Store(tmp_path / "store")
    path = sealed(store, "key/file")
    DAMAGES[damage](path)
    assert store.find("key/file") is None
    assert names(path.parent) == []
    assert sealed(store, "key/file") == store.find("key/file")


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


def test_prune_keeps_named_files_and_removes_all_others(tmp_path):
    store = Store(tmp_path / "store")
    for name in ("a/1", "a/2", "b/1"):
        sealed(store, name)
    (store.path("a/.3.0123abcd.tmp")).write_bytes(b"left behind by a killed process")
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


def test_a_lock_that_is_not_free_in_time_is_an_error_with_the_owners_pid(tmp_path, hold):
    owner = hold()
    assert owner.stdout.readline() == "held\n"
    said = []
    with (
        pytest.raises(StoreError, match=f"work.lock is held by process {owner.pid}: stop it or wait"),
        lock(tmp_path / "work.lock", said.append, timeout=0.05),
    ):
        pytest.fail("the lock is held by another process")
    assert len(said) == 1
    assert str(owner.pid) in said[0]


def test_the_lock_of_a_killed_process_is_free(tmp_path, hold):
    owner = hold()
    assert owner.stdout.readline() == "held\n"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    said = []
    with lock(tmp_path / "work.lock", said.append, timeout=0):
        pass
    assert said == []


def test_a_directory_with_somebody_elses_files_is_not_replaced(tmp_path):
    (tmp_path / "out/photos").mkdir(parents=True)
    (tmp_path / "out/seed-0.safetensors").touch()

    def replace():
        with atomic_directory(tmp_path / "out", "seed-*.safetensors"):
            pytest.fail("the folder is not ours")

    with pytest.raises(StoreError, match="out: holds 'photos', which is not written here: choose another folder"):
        replace()
    assert names(tmp_path / "out") == ["photos", "seed-0.safetensors"]
