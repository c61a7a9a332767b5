"""Where the columns of a shard lie, by what HDF5 says of it, and nothing but what this format has.

Files may come from strangers: of each column, type, layout, filters and the place of every byte are checked before any
of its data is read.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np
from h5py import h5a, h5d, h5f, h5l, h5o, h5s, h5t, h5z

from pipeline.core.errors import ShardError
from pipeline.shards.limits import LARGEST_CHUNK, LARGEST_COLUMN

COLUMN_NAME = re.compile(r"[a-z_]{1,100}")
ATTRIBUTES = 4  # of a shard
NUMBER_TYPE, DIGEST_TYPE = np.dtype(np.int64), np.dtype("S64")  # of attributes


class Chunk(NamedTuple):
    """Some rows of a column."""

    offset: int
    size: int


class ColumnPlace(NamedTuple):
    """Where the bytes of a column are."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    rows_per_chunk: int
    chunks: list[Chunk]
    compressed: bool

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])


class RefusedError(Exception):
    """A reason not to read a column."""


def names_of(file: h5f.FileID, place: str) -> list[str]:
    """Return the names in a file; a few hundred at most."""
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


def column_of(file: h5f.FileID, name: str, file_size: int) -> ColumnPlace:
    """Check everything about a column that does not need its data."""
    key = name.encode()
    if not file.links.exists(key):
        raise RefusedError("is missing")
    if file.links.get_info(key).type != h5l.TYPE_HARD:
        raise RefusedError("is a link to elsewhere")
    info = h5o.get_info(file, key)
    if info.type != h5o.TYPE_DATASET:
        raise RefusedError("is no dataset of this file")
    if info.rc != 1:
        raise RefusedError("goes by several names")
    dataset = h5d.open(file, key)
    layout, space = dataset.get_create_plist(), dataset.get_space()
    if layout.get_layout() == h5d.VIRTUAL or layout.get_external_count():
        raise RefusedError("is no dataset of this file")
    if dataset.get_type().get_class() not in (h5t.INTEGER, h5t.FLOAT) or dataset.get_type().get_size() > 8:
        raise RefusedError("does not hold plain numbers")
    dtype = dataset.dtype
    if not dtype.isnative or not dataset.get_type().equal(h5t.py_create(dtype)):
        raise RefusedError(f"holds {dtype} in an unusual form")
    if space.get_simple_extent_type() != h5s.SIMPLE or not space.get_simple_extent_ndims():
        raise RefusedError("has no rows")
    if h5a.get_num_attrs(dataset):
        raise RefusedError("has attributes")
    shape = space.get_simple_extent_dims()
    if not 0 < math.prod(shape) * dtype.itemsize <= LARGEST_COLUMN:
        raise RefusedError(f"has shape {shape}")
    filters = [layout.get_filter(number)[0] for number in range(layout.get_nfilters())]
    if layout.get_layout() == h5d.CONTIGUOUS and not filters:
        return _in_one_piece(dataset, ColumnPlace(dtype, shape, shape[0], [], False), file_size)
    if layout.get_layout() == h5d.CHUNKED and filters == [h5z.FILTER_SHUFFLE, h5z.FILTER_DEFLATE]:
        return _in_chunks(dataset, ColumnPlace(dtype, shape, layout.get_chunk()[0], [], True), file_size)
    raise RefusedError(f"is stored in another way (layout {layout.get_layout()}, filters {filters})")


def _in_one_piece(dataset: h5d.DatasetID, column: ColumnPlace, file_size: int) -> ColumnPlace:
    offset, size = dataset.get_offset(), column.shape[0] * column.row_bytes
    if offset is None or dataset.get_storage_size() != size or offset + size > file_size:
        raise RefusedError("is not wholly in the file")
    return column._replace(chunks=[Chunk(offset, size)])


def _in_chunks(dataset: h5d.DatasetID, column: ColumnPlace, file_size: int) -> ColumnPlace:
    shape, chunk = column.shape, dataset.get_create_plist().get_chunk()
    too_large = chunk[0] > 1 and chunk[0] * column.row_bytes > LARGEST_CHUNK
    if chunk[1:] != shape[1:] or not 0 < chunk[0] <= shape[0] or too_large:
        raise RefusedError(f"has chunks {chunk} for shape {shape}")
    expected = math.ceil(shape[0] / chunk[0])
    if dataset.get_num_chunks() != expected:
        raise RefusedError(f"has {dataset.get_num_chunks()} of {expected} chunks")
    stored: list[h5d.StoreInfo] = []
    dataset.chunk_iter(stored.append)
    size = chunk[0] * column.row_bytes
    largest = size + size // 100 + 64  # deflate adds a little to what cannot be compressed
    chunks = {}
    for each in stored:
        number, rest = divmod(each.chunk_offset[0], chunk[0])
        moved = rest or any(each.chunk_offset[1:]) or each.filter_mask
        if moved or not 0 < each.size <= largest or each.byte_offset + each.size > file_size:
            raise RefusedError("has a chunk that is not whole")
        chunks[number] = Chunk(each.byte_offset, each.size)
    if chunks.keys() != set(range(expected)):
        raise RefusedError("lacks a chunk")
    return column._replace(chunks=[chunks[number] for number in range(expected)])


def read_attribute(file: h5f.FileID, name: str) -> int | str | None:
    """Read an attribute of a shard: a whole number or 64 characters; None if there is none of these kinds."""
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
