"""Writing shards: the same bytes for the same columns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.hdf5 import written_hdf5
from pipeline.shards.format import Column, attributes_of, version_of

# Of compressed columns: a few dozen images, small enough for single rows, large enough for whole shards. Others lie in
# one piece, so that readers find any rows without HDF5.
CHUNK_BYTES = 1 << 17
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
            stored: dict[str, Any] = {}
            if compression == "gzip" and array[0].nbytes >= COMPRESSED_FROM:
                chunk = (min(rows, max(1, CHUNK_BYTES // array[0].nbytes)), *array.shape[1:])
                stored = {"chunks": chunk, "compression": "gzip", "shuffle": True}
            file.create_dataset(name, data=array, track_times=False, **stored)
            # Else HDF5 writes a column when its last reference goes, which is a matter of chance (a profiler may hold
            # one), and the columns come to lie in another order.
            file.flush()
