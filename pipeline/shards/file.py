"""Reading columns of one shard: HDF5 says where they are, and nothing but what this format has is read.

Files may come from strangers. Of each column that is opened, type, layout, filters and the place of every byte are
checked first; data is then read and decompressed here, never more than its shape holds, and not by HDF5.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from h5py import h5f
from numpy.typing import NDArray

from pipeline.core.errors import ShardError
from pipeline.core.text import one_line
from pipeline.shards.folder import ByteSource, Folder, LocalFolder
from pipeline.shards.hdf5_layout import ColumnPlace, RefusedError, column_of, names_of, read_attribute

SIGNATURE = b"\x89HDF\r\n\x1a\n"  # at the very start: no user block
OWN_CACHE = 1 << 20  # bytes of decompressed chunks
_opened = itertools.count()  # a path may lead to another file when it is opened again


class ChunkCache:
    """The decompressed chunks that were read last, of any number of files, in so many bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self._bytes = limit, 0
        self._chunks: OrderedDict[tuple[int, str, int], NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, file: int, column: str, number: int, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Return a chunk of a column of a file (by its number in `_opened`), made when it is not here."""
        key = (file, column, number)
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
                return self._chunks[key]
        chunk = make()
        with self._lock:
            if key not in self._chunks and chunk.nbytes <= self.limit:
                self._chunks[key] = chunk
                self._bytes += chunk.nbytes
            while self._bytes > self.limit:
                self._bytes -= self._chunks.popitem(last=False)[1].nbytes
        return chunk

    def __reduce__(self) -> tuple[type[ChunkCache], tuple[int]]:
        return ChunkCache, (self.limit,)  # to another process it goes empty


class ShardFile(contextlib.AbstractContextManager["ShardFile"]):
    """A shard that is open for reading. Several processes may share it after a fork.

    Columns that are not compressed lie in one piece, and any rows of them are read with one call, many times as fast as
    HDF5 finds its way to a single row.

    Args:
        source: the open file.
        place: its path or URL, for messages.
        columns: names of those that will be read; None for all that the file has.
        attributes: that the file must have.
        cache: of decompressed chunks; by default a small one of its own.

    Raises:
        ShardError: the file is no shard, is another one, lacks a column, or stores one in a way that this format does
            not have.
    """

    def __init__(
        self,
        source: ByteSource,
        place: str,
        columns: Iterable[str] | None,
        attributes: Mapping[str, Any] | None = None,
        cache: ChunkCache | None = None,
    ) -> None:
        self.place, self._source, self._number = place, source, next(_opened)
        self._cache = cache or ChunkCache(OWN_CACHE)
        try:
            start = bytearray(len(SIGNATURE))
            if source.read_into(memoryview(start), 0) < len(start) or start != SIGNATURE:
                raise ShardError(f"{place}: not a readable shard (it is no HDF5 file)")
            with source.hdf5() as file:
                for name, value in (attributes or {}).items():
                    if (found := read_attribute(file.id, name)) != value:
                        difference = f"'{name}' is {found!r}, expected {value!r}"
                        raise ShardError(f"{place}: is another shard than it was ({difference}): run again")
                self.names = names_of(file.id, place) if columns is None else list(columns)
                self._columns = {name: self._checked(file.id, name) for name in self.names}
        except ShardError:
            self.close()
            raise
        except Exception as error:  # h5py raises all kinds on what is no shard
            self.close()
            raise ShardError(f"{place}: not a readable shard ({one_line(error)})") from None

    def _checked(self, file: h5f.FileID, name: str) -> ColumnPlace:
        try:
            return column_of(file, name, self._source.size)
        except RefusedError as error:
            raise ShardError(f"{self.place}: column '{name}' {error}") from None

    def layout(self, column: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Return the dtype and shape of a column."""
        return self._columns[column].dtype, self._columns[column].shape

    def read(self, column: str, first: int = 0, end: int | None = None) -> NDArray[Any]:
        """Read rows `first` to `end` of a column, as stored, but int64 for uint32, which torch hardly knows."""
        place = self._columns[column]
        first, end, _ = slice(first, end).indices(place.shape[0])
        values: NDArray[Any] = np.empty((max(0, end - first), *place.shape[1:]), place.dtype)
        if not place.compressed:
            self._fill(values, place.chunks[0].offset + first * place.row_bytes, column)
        else:
            step = place.rows_per_chunk
            for number in range(first // step, math.ceil(end / step)) if len(values) else ():
                start = number * step
                chunk = self._cache.get(self._number, column, number, partial(self._decompress, column, number))
                rows = chunk[max(0, first - start) : end - start]
                at = max(first, start) - first
                values[at : at + len(rows)] = rows
        return values.astype(np.int64) if values.dtype == np.uint32 else values

    def check_chunks(self) -> None:
        """Decompress every chunk of every column, to find those that do not hold what they should.

        Raises:
            ShardError: names the column.
        """
        for name, column in self._columns.items():
            for number in range(len(column.chunks)) if column.compressed else ():
                self._decompress(name, number)

    def _fill(self, values: NDArray[Any], offset: int, column: str) -> None:
        view = memoryview(values.reshape(-1).view(np.uint8).data)
        try:
            count = self._source.read_into(view, offset)
        except OSError as error:
            raise ShardError(f"{self.place}: column '{column}' cannot be read ({error})") from None
        if count < len(view):
            raise ShardError(f"{self.place}: ends within column '{column}'")

    def _decompress(self, name: str, number: int) -> NDArray[Any]:
        """Return one chunk, inflated, its bytes put back in order (those of one significance lie together)."""
        column = self._columns[name]
        stored = np.empty(column.chunks[number].size, np.uint8)
        self._fill(stored, column.chunks[number].offset, name)
        size, inflate = column.rows_per_chunk * column.row_bytes, zlib.decompressobj()
        try:
            content = inflate.decompress(stored.data, size + 1)
        except zlib.error as error:
            raise ShardError(f"{self.place}: column '{name}' cannot be decompressed ({error})") from None
        if len(content) != size or not inflate.eof:
            raise ShardError(f"{self.place}: column '{name}' does not decompress to {size} bytes a chunk")
        width = column.dtype.itemsize
        values = np.ascontiguousarray(np.frombuffer(content, np.uint8).reshape(width, -1).T)
        rows: NDArray[Any] = values.view(column.dtype).reshape(column.rows_per_chunk, *column.shape[1:])
        return rows

    def close(self) -> None:
        self._source.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def open_shard(
    folder: Folder,
    name: str,
    columns: Iterable[str] | None,
    attributes: Mapping[str, Any] | None = None,
    cache: ChunkCache | None = None,
) -> ShardFile:
    """Open a shard of a folder for reading; arguments and errors as for `ShardFile`."""
    try:
        source = folder.open(name)
    except OSError as error:
        raise ShardError(f"{folder}/{name}: not a readable shard ({error})") from None
    return ShardFile(source, f"{folder}/{name}", columns, attributes, cache)


def read_columns(
    path: Path, columns: Iterable[str], attributes: Mapping[str, Any] | None = None
) -> dict[str, NDArray[Any]]:
    """Read whole columns of a shard as `ShardFile.read` does; arguments and errors are those of `ShardFile`."""
    names = list(columns)
    with open_shard(LocalFolder(path.parent), path.name, names, attributes) as file:
        return {name: file.read(name) for name in names}
