"""Reading columns of a shard, beside h5py's own reading of the same file."""

import gc
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from pipeline.core.errors import ShardError
from pipeline.core.provenance import ROOT
from pipeline.shards.file import open_shard, read_columns
from pipeline.shards.folder import LocalFolder

GOLDEN = ROOT / "tests/golden/version-1"
ROWS = 37
COMPRESSED = {"shuffle": True, "compression": "gzip"}
LAYOUTS = {
    "one piece": {},
    "chunks": {"chunks": (4, 3, 5), **COMPRESSED},
    "one chunk": {"chunks": (ROWS, 3, 5), **COMPRESSED},
    "single rows": {"chunks": (1, 3, 5), **COMPRESSED},
}
OTHERS = {
    "chunks without filters": {"chunks": (4, 3, 5)},
    "gzip alone": {"chunks": (4, 3, 5), "compression": "gzip"},
    "checksum": {"chunks": (4, 3, 5), "fletcher32": True},
    "lzf": {"chunks": (4, 3, 5), "shuffle": True, "compression": "lzf"},
    "parts of rows": {"chunks": (4, 3, 2), **COMPRESSED},
    "room for more": {"chunks": (ROWS + 3, 3, 5), "maxshape": (None, 3, 5), **COMPRESSED},
    "other byte order": {"dtype": ">f4"},
}


def write(path, options, seed=0, **file_options):
    """A file with a column `index` and one `value`; returns the values."""
    values = np.random.default_rng(seed).normal(size=(ROWS, 3, 5)).astype(np.float32)
    with h5py.File(path, "w", **file_options) as file:
        file.create_dataset("index", data=np.arange(ROWS, dtype=np.uint32))
        file.create_dataset("value", data=values, **options)
    return values


def opened(path, columns=("value",)):
    return open_shard(LocalFolder(path.parent), path.name, columns)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_rows_of_any_layout_are_those_that_were_written(tmp_path, layout):
    values = write(tmp_path / "a.h5", LAYOUTS[layout])
    with opened(tmp_path / "a.h5", ["index", "value"]) as file:
        for first, end in ((0, None), (0, ROWS), (5, 6), (7, 30), (30, 99), (-3, None), (9, 9), (20, 10), (ROWS, None)):
            rows = file.read("value", first, end)
            assert rows.dtype == np.float32
            assert np.array_equal(rows, values[first:end]), (first, end)
            index = file.read("index", first, end)
            assert index.dtype == np.int64
            assert np.array_equal(index, np.arange(ROWS)[first:end]), (first, end)
        file.check_chunks()


@pytest.mark.parametrize("layout", OTHERS)
def test_a_layout_that_the_format_does_not_have_is_refused(tmp_path, layout):
    write(tmp_path / "a.h5", OTHERS[layout])
    with pytest.raises(ShardError, match=r"a\.h5: column 'value' (is stored in another way|has chunks|holds >f4)"):
        opened(tmp_path / "a.h5")


def test_a_file_with_a_user_block_is_refused(tmp_path):
    write(tmp_path / "a.h5", {}, userblock_size=512)
    with pytest.raises(ShardError, match=r"a\.h5: not a readable shard \(it is no HDF5 file\)"):
        opened(tmp_path / "a.h5")


def test_a_read_that_comes_in_parts_is_put_together(tmp_path, monkeypatch):
    values = write(tmp_path / "a.h5", {})

    def seven_bytes(handle, buffers, offset, do=os.preadv):
        return do(handle, [buffers[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", seven_bytes)
    with opened(tmp_path / "a.h5") as file:
        assert np.array_equal(file.read("value", 3, 11), values[3:11])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_is_cut_off_while_it_is_open_is_named(tmp_path, layout):
    path = tmp_path / "a.h5"
    write(path, LAYOUTS[layout])
    with opened(path) as file:
        os.truncate(path, 2000)
        with pytest.raises(ShardError, match=r"a\.h5: ends within column 'value'"):
            file.read("value")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_bytes(b""), "not a readable shard"),
        (lambda path: path.write_bytes(b"x" * 4096), "not a readable shard"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"x" * 4096), "not a readable shard"),
        (lambda path: path.mkdir(), "not a readable shard"),
        (lambda path: h5py.File(path, "w").close(), "column 'value' is missing"),
    ],
    ids=["absent", "empty", "no HDF5", "a signature alone", "a folder", "no columns"],
)
def test_what_is_no_shard_is_refused_and_leaves_no_open_file(tmp_path, make, text):
    make(tmp_path / "a.h5")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ShardError, match=rf"a\.h5.*{text}"):
        read_columns(tmp_path / "a.h5", ["value"])
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_closed_file_holds_no_handle(tmp_path, layout):
    write(tmp_path / "a.h5", LAYOUTS[layout])
    before = len(os.listdir("/proc/self/fd"))
    file = opened(tmp_path / "a.h5")
    file.close()
    file.close()
    assert len(os.listdir("/proc/self/fd")) == before


def open_here(folder):
    """How many files of a folder this process has open."""
    return sum(os.path.realpath(f"/proc/self/fd/{n}").startswith(f"{folder}") for n in os.listdir("/proc/self/fd"))


def test_a_file_that_nobody_holds_is_closed(tmp_path):
    write(tmp_path / "a.h5", {})
    file = opened(tmp_path / "a.h5")
    assert open_here(tmp_path) == 1
    del file
    gc.collect()
    assert open_here(tmp_path) == 0


ENDS = {
    "of itself": "",
    "by an error": "raise SystemExit(0)",
    "while a thread reads": "threading.Thread(target=lambda: [shards[0], time.sleep(60)], daemon=True).start()",
    "while what lives longest holds them": "builtins.kept = [bd, shards]",
    "in a circle": "shards.itself = shards",
    "with a loader's workers": "rows = iter(DataLoader(shards, batch_size=8, num_workers=2)); next(rows)",
    "with fresh workers": (
        "rows = iter(DataLoader(shards, batch_size=8, num_workers=1, multiprocessing_context='spawn')); next(rows)"
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_process_that_ends_with_open_shards_says_nothing(tmp_path, end):
    script = f"""
import builtins, threading, time
import pipeline as bd
from torch.utils.data import DataLoader
if __name__ == "__main__":
    shards = bd.BoundaryShards({str(GOLDEN / "plain")!r})
    assert shards._files
    {ENDS[end]}
"""
    (tmp_path / "mine.py").write_text(script)
    ended = subprocess.run(
        [sys.executable, tmp_path / "mine.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
