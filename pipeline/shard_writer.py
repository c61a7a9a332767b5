"""Writing shards: the same bytes for the same columns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.shard_format import Column, attributes_of
from pipeline.storage import written_hdf5

# Of compressed columns, a few dozen images: small enough for single rows, large enough for whole shards. Others are one
# chunk, so that readers find any rows without HDF5's index.
CHUNK_BYTES = 1 << 17


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
        compression: none, lzf or gzip.

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
        for name, value in attributes_of(fingerprint, view, block).items():
            file.attrs[name] = value
        for name in columns:
            array = values[name]
            per_chunk = rows if compression == "none" else min(rows, max(1, CHUNK_BYTES // array[0].nbytes))
            file.create_dataset(
                name,
                data=array,
                chunks=(per_chunk, *array.shape[1:]),
                compression=None if compression == "none" else compression,
                shuffle=compression != "none",
                track_times=False,
            )
            # Else HDF5 writes a column when its last reference goes, which is a matter of chance (a profiler may hold
            # one), and the columns come to lie in another order.
            file.flush()
