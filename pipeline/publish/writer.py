"""Writing shards: the same bytes for the same columns."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.core.hdf5 import written_hdf5
from pipeline.shards.format import Column, attributes_of, version_of

# Of compressed columns: a few dozen images, small enough for single rows, large enough for whole shards. Others lie in
# one piece, so that readers find any rows without HDF5.
CHUNK_BYTES = 1 << 17
SEARCHING = 4  # level of deflate, as HDF5 has it by default
COMPRESSED_FROM = 16  # bytes a row: of less, HDF5's index of chunks would take more than is saved


def write_shard(
    path: Path,
    values: Mapping[str, NDArray[Any]],
    columns: Mapping[str, Column],
    *,
    fingerprint: str,
    view: int,
    block: int,
    compression: str,
) -> None:
    """Write one shard, atomically.

    Args:
        path: the file.
        values: an array (rows, ...) for each column.
        columns: names, dtypes and row shapes that `values` must have.
        fingerprint, view, block: recorded as attributes.
        compression: none or gzip.

    Raises:
        ValueError: the values do not fit the columns.
        StoreError: the file cannot be written.
    """
    rows = len(values["index"])
    if set(values) != set(columns):
        raise ValueError(f"columns differ: {sorted(set(values) ^ set(columns))}")
    for name, column in columns.items():
        if values[name].dtype != np.dtype(column.dtype) or values[name].shape != (rows, *column.shape):
            raise ValueError(
                f"column '{name}': expected {column.dtype} {(rows, *column.shape)}, "
                f"got {values[name].dtype} {values[name].shape}"
            )
    with written_hdf5(path) as file:
        for name, value in attributes_of(version_of(columns), fingerprint, view, block).items():
            file.attrs[name] = np.bytes_(value) if isinstance(value, str) else np.int64(value)  # of fixed size
        for name in columns:
            array = values[name]
            if compression == "gzip" and array[0].nbytes >= COMPRESSED_FROM:
                _write_chunks(file, name, array)
            else:
                file.create_dataset(name, data=array, track_times=False)
            # Else HDF5 writes a column when its last reference goes, which is a matter of chance (a profiler may hold
            # one), and the columns come to lie in another order.
            file.flush()


def _write_chunks(file: h5py.File, name: str, array: NDArray[Any]) -> None:
    """Write a column in chunks, each deflated in the way that makes it smallest; HDF5 itself knows one way only."""
    rows = min(len(array), max(1, CHUNK_BYTES // array[0].nbytes))
    chunk = (rows, *array.shape[1:])
    dataset = file.create_dataset(
        name, array.shape, array.dtype, chunks=chunk, compression="gzip", shuffle=True, track_times=False
    )
    nowhere = (0,) * (array.ndim - 1)
    for start in range(0, len(array), rows):
        whole = np.zeros(chunk, array.dtype)  # the last one is filled up
        part = array[start : start + rows]
        whole[: len(part)] = part
        dataset.id.write_direct_chunk((start, *nowhere), _deflated(whole))


def _deflated(chunk: NDArray[Any]) -> bytes:
    """Return a chunk as HDF5's filters shuffle and deflate would leave it.

    Perturbations are noise, in which deflate looks in vain for what it has seen before: their numbers are coded by how
    often each comes, which takes a tenth to a seventh less. Images and logits are better off with its search.
    """
    shuffled = np.ascontiguousarray(chunk.reshape(-1).view(np.uint8).reshape(-1, chunk.itemsize).T).tobytes()
    ways = []
    for level, strategy in ((SEARCHING, zlib.Z_DEFAULT_STRATEGY), (zlib.Z_BEST_COMPRESSION, zlib.Z_HUFFMAN_ONLY)):
        deflate = zlib.compressobj(level, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
        ways.append(deflate.compress(shuffled) + deflate.flush())
    return min(ways, key=len)
