"""Reading columns of a shard straight from the file, beside h5py's own reading of the same file."""

import os

import h5py
import numpy as np
import pytest

from pipeline import shard_file
from pipeline.errors import ShardError
from pipeline.shard_file import ShardFile, read_columns

ROWS = 37
# Each in one piece and as in memory, so read with no help of HDF5; else not.
LAYOUTS = {
    "one chunk": ({"chunks": (ROWS, 3, 5)}, True),
    "many chunks": ({"chunks": (4, 3, 5)}, False),
    "one larger chunk": ({"chunks": (ROWS + 3, 3, 5), "maxshape": (None, 3, 5)}, False),
    "contiguous": ({}, False),
    "gzip": ({"chunks": (ROWS, 3, 5), "compression": "gzip"}, False),
    "checksum": ({"chunks": (ROWS, 3, 5), "fletcher32": True}, False),
    "shuffled bytes": ({"chunks": (ROWS, 3, 5), "shuffle": True}, False),
    "other byte order": ({"chunks": (ROWS, 3, 5), "dtype": ">f4"}, False),
    "never written": ({"chunks": (ROWS, 3, 5)}, False),
}


def random_values(seed):
    return np.random.default_rng(seed).normal(size=(ROWS, 3, 5)).astype(np.float32)


def write(path, layout, seed=0, **file_options):
    """A file with a column `index`, in one chunk, and one `value` in a layout; returns the values."""
    options, _ = LAYOUTS[layout]
    values = np.zeros((ROWS, 3, 5), np.float32) if layout == "never written" else random_values(seed)
    with h5py.File(path, "w", **file_options) as file:
        file.create_dataset("index", data=np.arange(ROWS, dtype=np.uint32), chunks=(ROWS,))
        column = file.create_dataset("value", values.shape, **({"dtype": "f4"} | options))
        if layout != "never written":
            column[:] = values
    return values


def reads_without_hdf5(path, monkeypatch):
    """Whether `value` is read in calls of the operating system alone."""
    calls = []
    monkeypatch.setattr(os, "preadv", lambda *arguments, do=os.preadv: calls.append(arguments) or do(*arguments))
    read_columns(path, ["value"])
    monkeypatch.undo()
    return bool(calls)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_rows_of_any_layout_are_those_that_h5py_reads(tmp_path, monkeypatch, layout):
    values = write(tmp_path / "a.h5", layout)
    with ShardFile(tmp_path / "a.h5", ["index", "value"]) as file:
        for first, end in ((0, None), (0, ROWS), (5, 6), (7, 30), (30, 99), (-3, None), (9, 9), (20, 10), (ROWS, None)):
            rows = file.read("value", first, end)
            assert rows.dtype == LAYOUTS[layout][0].get("dtype", np.float32)
            assert np.array_equal(rows, values[first:end]), (first, end)
            index = file.read("index", first, end)
            assert index.dtype == np.int64
            assert np.array_equal(index, np.arange(ROWS)[first:end]), (first, end)
    assert reads_without_hdf5(tmp_path / "a.h5", monkeypatch) == LAYOUTS[layout][1]


def test_a_file_with_a_user_block_is_read_right(tmp_path, monkeypatch):
    values = write(tmp_path / "a.h5", "one chunk", userblock_size=512)
    assert np.array_equal(read_columns(tmp_path / "a.h5", ["value"])["value"], values)
    assert not reads_without_hdf5(tmp_path / "a.h5", monkeypatch)


def test_a_read_that_comes_in_parts_is_put_together(tmp_path, monkeypatch):
    values = write(tmp_path / "a.h5", "one chunk")

    def seven_bytes(handle, buffers, offset, do=os.preadv):
        return do(handle, [buffers[0][:7]], offset)

    monkeypatch.setattr(shard_file.os, "preadv", seven_bytes)
    with ShardFile(tmp_path / "a.h5", ["value"]) as file:
        assert np.array_equal(file.read("value", 3, 11), values[3:11])


@pytest.mark.parametrize("layout", ["one chunk", "gzip"])
def test_a_file_that_is_cut_off_while_it_is_open_is_named(tmp_path, layout):
    path = tmp_path / "a.h5"
    write(path, layout)
    with ShardFile(path, ["value"]) as file:
        os.truncate(path, 2000)
        with pytest.raises(ShardError, match=r"a\.h5.*'value'"):
            file.read("value")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_bytes(b""), "not a readable shard"),
        (lambda path: path.write_bytes(b"x" * 4096), "not a readable shard"),
        (lambda path: path.mkdir(), "not a readable shard"),
        (lambda path: h5py.File(path, "w").close(), "not a readable shard"),
    ],
    ids=["absent", "empty", "no HDF5", "a folder", "no columns"],
)
def test_what_is_no_shard_is_refused_and_leaves_no_open_file(tmp_path, make, text):
    make(tmp_path / "a.h5")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ShardError, match=rf"a\.h5.*{text}"):
        ShardFile(tmp_path / "a.h5", ["value"])
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_closed_file_holds_no_handle(tmp_path):
    write(tmp_path / "a.h5", "gzip")
    before = len(os.listdir("/proc/self/fd"))
    file = ShardFile(tmp_path / "a.h5", ["value"])
    file.close()
    file.close()
    assert len(os.listdir("/proc/self/fd")) == before
