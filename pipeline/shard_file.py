"""Reading columns of one shard: HDF5 says where they are, and nothing but what this format has is read.

Files may come from strangers. Of each column that is opened, type, layout, filters and the place of every byte are
checked first; data is then read and decompressed here, never more than its shape holds, and not by HDF5.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from h5py import h5a, h5d, h5f, h5l, h5o, h5s, h5t, h5z
from numpy.typing import NDArray

from pipeline.byte_source import ByteSource, Folder, LocalFolder
from pipeline.errors import ShardError

SIGNATURE = b"\x89HDF\r\n\x1a\n"  # at the very start: no user block
COLUMN_NAME = re.compile(r"[a-z_]{1,100}")
ATTRIBUTES = 4  # of a shard
LARGEST_CHUNK = 1 << 24  # bytes, unless a single row is larger
OWN_CACHE = 1 << 20  # bytes of decompressed chunks
LARGEST_COLUMN = 1 << 32  # bytes in memory
NUMBER_TYPE, DIGEST_TYPE = np.dtype(np.int64), np.dtype("S64")  # of attributes


class _Chunk(NamedTuple):
    """Some rows of a column."""

    offset: int
    size: int


class _Column(NamedTuple):
    """Where the bytes of a column are."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    rows_per_chunk: int
    chunks: list[_Chunk]
    compressed: bool

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])


class _RefusedError(Exception):
    """A reason not to read a column."""


class ChunkCache:
    """The decompressed chunks that were read last, of any number of files, in so many bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self._bytes = limit, 0
        self._chunks: OrderedDict[tuple[str, str, int], NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, place: str, column: str, number: int, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """A chunk of a column of a file, made when it is not here."""
        key = (place, column, number)
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
        self.place, self._source = place, source
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
                self.names = _names_of(file.id, place) if columns is None else list(columns)
                self._columns = {name: self._checked(file.id, name) for name in self.names}
        except ShardError:
            self.close()
            raise
        except Exception as error:  # h5py raises all kinds on what is no shard
            self.close()
            raise ShardError(f"{place}: not a readable shard ({' '.join(str(error).split())})") from None

    def _checked(self, file: h5f.FileID, name: str) -> _Column:
        try:
            return _column_of(file, name, self._source.size)
        except _RefusedError as error:
            raise ShardError(f"{self.place}: column '{name}' {error}") from None

    def layout(self, column: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """The dtype and shape of a column."""
        return self._columns[column].dtype, self._columns[column].shape

    def read(self, column: str, first: int = 0, end: int | None = None) -> NDArray[Any]:
        """Rows `first` to `end` of a column, as stored, except that uint32 becomes int64 (torch hardly knows it)."""
        place = self._columns[column]
        first, end, _ = slice(first, end).indices(place.shape[0])
        values: NDArray[Any] = np.empty((max(0, end - first), *place.shape[1:]), place.dtype)
        if not place.compressed:
            self._fill(values, place.chunks[0].offset + first * place.row_bytes, column)
        else:
            step = place.rows_per_chunk
            for number in range(first // step, math.ceil(end / step)) if len(values) else ():
                start = number * step
                chunk = self._cache.get(self.place, column, number, partial(self._decompress, column, number))
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
        """One chunk: inflated, and its bytes put back in order (those of all values, by significance, lie together)."""
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

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _names_of(file: h5f.FileID, place: str) -> list[str]:
    """The names in a file; a few hundred at most."""
    group = h5o.open(file, b"/")
    if group.get_num_objs() > 256:
        raise ShardError(f"{place}: has {group.get_num_objs()} columns")
    names = [name.decode(errors="replace") for name in group]
    for name in names:
        if not COLUMN_NAME.fullmatch(name):  # HDF5 would take some for paths, and follow links in them
            raise ShardError(f"{place}: has a column of an impossible name, {ascii(name)[:100]}")
    if h5a.get_num_attrs(file) != ATTRIBUTES:
        raise ShardError(f"{place}: has {h5a.get_num_attrs(file)} attributes, not {ATTRIBUTES}")
    return names


def _column_of(file: h5f.FileID, name: str, file_size: int) -> _Column:
    """Check everything about a column that does not need its data."""
    key = name.encode()
    if not file.links.exists(key):
        raise _RefusedError("is missing")
    if file.links.get_info(key).type != h5l.TYPE_HARD:
        raise _RefusedError("is a link to elsewhere")
    info = h5o.get_info(file, key)
    if info.type != h5o.TYPE_DATASET:
        raise _RefusedError("is no dataset of this file")
    if info.rc != 1:
        raise _RefusedError("goes by several names")
    dataset = h5d.open(file, key)
    layout, space = dataset.get_create_plist(), dataset.get_space()
    if layout.get_layout() == h5d.VIRTUAL or layout.get_external_count():
        raise _RefusedError("is no dataset of this file")
    if dataset.get_type().get_class() not in (h5t.INTEGER, h5t.FLOAT) or dataset.get_type().get_size() > 8:
        raise _RefusedError("does not hold plain numbers")
    dtype = dataset.dtype
    if not dtype.isnative or not dataset.get_type().equal(h5t.py_create(dtype)):
        raise _RefusedError(f"holds {dtype} in an unusual form")
    if space.get_simple_extent_type() != h5s.SIMPLE or not space.get_simple_extent_ndims():
        raise _RefusedError("has no rows")
    if h5a.get_num_attrs(dataset):
        raise _RefusedError("has attributes")
    shape = space.get_simple_extent_dims()
    if not 0 < math.prod(shape) * dtype.itemsize <= LARGEST_COLUMN:
        raise _RefusedError(f"has shape {shape}")
    filters = [layout.get_filter(number)[0] for number in range(layout.get_nfilters())]
    if layout.get_layout() == h5d.CONTIGUOUS and not filters:
        return _in_one_piece(dataset, _Column(dtype, shape, shape[0], [], False), file_size)
    if layout.get_layout() == h5d.CHUNKED and filters == [h5z.FILTER_SHUFFLE, h5z.FILTER_DEFLATE]:
        return _in_chunks(dataset, _Column(dtype, shape, layout.get_chunk()[0], [], True), file_size)
    raise _RefusedError(f"is stored in another way (layout {layout.get_layout()}, filters {filters})")


def _in_one_piece(dataset: h5d.DatasetID, column: _Column, file_size: int) -> _Column:
    offset, size = dataset.get_offset(), column.shape[0] * column.row_bytes
    if offset is None or dataset.get_storage_size() != size or offset + size > file_size:
        raise _RefusedError("is not wholly in the file")
    return column._replace(chunks=[_Chunk(offset, size)])


def _in_chunks(dataset: h5d.DatasetID, column: _Column, file_size: int) -> _Column:
    shape, chunk = column.shape, dataset.get_create_plist().get_chunk()
    too_large = chunk[0] > 1 and chunk[0] * column.row_bytes > LARGEST_CHUNK
    if chunk[1:] != shape[1:] or not 0 < chunk[0] <= shape[0] or too_large:
        raise _RefusedError(f"has chunks {chunk} for shape {shape}")
    expected = math.ceil(shape[0] / chunk[0])
    if dataset.get_num_chunks() != expected:
        raise _RefusedError(f"has {dataset.get_num_chunks()} of {expected} chunks")
    stored: list[h5d.StoreInfo] = []
    dataset.chunk_iter(stored.append)
    size = chunk[0] * column.row_bytes
    largest = size + size // 100 + 64  # deflate adds a little to what cannot be compressed
    chunks = {}
    for each in stored:
        number, rest = divmod(each.chunk_offset[0], chunk[0])
        moved = rest or any(each.chunk_offset[1:]) or each.filter_mask
        if moved or not 0 < each.size <= largest or each.byte_offset + each.size > file_size:
            raise _RefusedError("has a chunk that is not whole")
        chunks[number] = _Chunk(each.byte_offset, each.size)
    if chunks.keys() != set(range(expected)):
        raise _RefusedError("lacks a chunk")
    return column._replace(chunks=[chunks[number] for number in range(expected)])


def read_attribute(file: h5f.FileID, name: str) -> int | str | None:
    """An attribute of a shard: a whole number or 64 characters; None if there is none, or one of another kind."""
    if not h5a.exists(file, name.encode()):
        return None
    attribute = h5a.open(file, name.encode())
    if attribute.get_space().get_simple_extent_type() != h5s.SCALAR:
        return None
    for dtype in (NUMBER_TYPE, DIGEST_TYPE):
        if attribute.get_type().equal(h5t.py_create(dtype)):
            value = np.empty((), dtype)
            attribute.read(value)
            return int(value) if dtype == NUMBER_TYPE else value.tobytes().decode("ascii", "replace")
    return None


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
    """Whole columns of a shard, as `ShardFile.read` gives them; arguments and errors are those of `ShardFile`."""
    names = list(columns)
    with open_shard(LocalFolder(path.parent), path.name, names, attributes) as file:
        return {name: file.read(name) for name in names}
