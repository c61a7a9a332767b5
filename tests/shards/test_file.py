"""Reading columns of a shard, beside h5py's own reading of the same file."""

import os

import h5py
import numpy as np
import pytest

from pipeline.core.errors import ShardError
from pipeline.shards.file import open_shard, read_columns
from pipeline.shards.folder import LocalFolder

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
