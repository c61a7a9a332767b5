"""Reading columns of one shard: straight from the file where they lie in one piece, else through HDF5."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ShardError

CHUNK_CACHE = 1 << 19  # bytes of each compressed column that HDF5 keeps; hundreds of files may be open


class _Place(NamedTuple):
    """Where the bytes of a column are: all its rows, one after the other."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class ShardFile(contextlib.AbstractContextManager["ShardFile"]):
    """A shard that is open for reading. Several processes may share it after a fork.

    Columns that are not compressed lie in one piece, and any rows of them are read with one call of the operating
    system, 10 times as fast as HDF5 finds its way to a single row.

    Args:
        path: the file.
        columns: names of those that will be read.
        attributes: that the file must have.

    Raises:
        ShardError: the file is no shard, is another one, or lacks a column.
    """

    def __init__(self, path: Path, columns: Iterable[str], attributes: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self._handle = -1
        self._datasets: dict[str, h5py.Dataset] = {}
        try:
            self._file = h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE)
            for name, value in (attributes or {}).items():
                if self._file.attrs.get(name) != value:
                    raise ShardError(f"{path}: is another shard than it was ('{name}'): run again")
            # Identifiers and no h5py.Dataset: to make that of every column takes longer than to read it.
            opened = {name: h5py.h5d.open(self._file.id, name.encode()) for name in columns}
            places = {} if self._file.userblock_size else {name: _place_of(column) for name, column in opened.items()}
            self._places = {name: place for name, place in places.items() if place}
            self._datasets = {name: h5py.Dataset(opened[name]) for name in opened.keys() - self._places.keys()}
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, KeyError, RuntimeError) as error:
            raise ShardError(f"{path}: not a readable shard ({error})") from None
        if not self._datasets:
            self._file.close()

    def read(self, column: str, first: int = 0, end: int | None = None) -> NDArray[Any]:
        """Rows `first` to `end` of a column, as stored, except that uint32 becomes int64 (torch hardly knows it)."""
        values: NDArray[Any]
        place = self._places.get(column)
        if place is None:
            try:
                values = self._datasets[column][first:end]
            except OSError as error:
                raise ShardError(f"{self.path}: column '{column}' cannot be read ({error})") from None
        else:
            first, end, _ = slice(first, end).indices(place.shape[0])
            values = np.empty((max(0, end - first), *place.shape[1:]), place.dtype)
            row_bytes = values[:1].nbytes
            # A call reads 2 GiB at most.
            view, done = memoryview(values.reshape(-1).view(np.uint8).data), 0
            while done < len(view):
                try:
                    count = os.preadv(self._handle, [view[done:]], place.offset + first * row_bytes + done)
                except OSError as error:
                    raise ShardError(f"{self.path}: column '{column}' cannot be read ({error})") from None
                if count == 0:
                    raise ShardError(f"{self.path}: ends within column '{column}'")
                done += count
        return values.astype(np.int64) if values.dtype == np.uint32 else values

    def close(self) -> None:
        self._datasets = {}
        self._file.close()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _place_of(column: h5py.h5d.DatasetID) -> _Place | None:
    """Where a column lies in its file, if it does so in one piece and as it is in memory."""
    layout, dtype, shape = column.get_create_plist(), column.dtype, column.shape
    chunked = layout.get_layout() == h5py.h5d.CHUNKED and layout.get_nfilters() == 0
    if not chunked or not dtype.isnative or layout.get_chunk() != shape or column.get_num_chunks() != 1:
        return None
    return _Place(column.get_chunk_info(0).byte_offset, dtype, shape)


def read_columns(
    path: Path, columns: Iterable[str], attributes: Mapping[str, Any] | None = None
) -> dict[str, NDArray[Any]]:
    """Whole columns of a shard, as `ShardFile.read` gives them; arguments and errors are those of `ShardFile`."""
    names = list(columns)
    with ShardFile(path, names, attributes) as file:
        return {name: file.read(name) for name in names}
