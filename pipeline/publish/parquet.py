"""Sample datasets as Parquet: one file for each shard, with the same values, shapes and dtypes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import ShardError, StoreError
from pipeline.core.files import atomic_directory, check_apart, check_replaceable, copy_file, write_atomically
from pipeline.shards.check import check_shard
from pipeline.shards.file import read_columns
from pipeline.shards.format import MANIFEST, Column, attributes_of
from pipeline.shards.manifest import Manifest, ShardEntry, columns_in_order, read_manifest

if TYPE_CHECKING:
    import pyarrow

OWNED = ("view-*-block-*.parquet", MANIFEST)  # names in a directory of Parquet files
COMPRESSION = "zstd"  # CIFAR-10: 78 % of an uncompressed shard, snappy 91 %; as fast
LARGEST_COLUMN = 2**31 - 1  # numbers of a shard: lists have 32-bit offsets
# Hugging Face's type of an array of several axes, by their number, and what its library reads and writes it as.
ARRAY_FEATURE = "Array{}D"
ARRAY_TYPE = "datasets.features.features.Array{}DExtensionType"


def export_parquet(directory: Path, out: Path) -> Manifest:
    """Write the shards of a dataset as Parquet files, and its manifest beside them as it is.

    Columns keep names, values and dtypes; `view` (int32) is added. Arrays are lists of their axes. The schema tells the
    library `datasets` of Hugging Face their shapes, and the names of the classes of `label`; it holds the attributes
    of the shard under `shard`. Memory: one shard.

    Args:
        directory: the dataset; each shard is checked before it is read.
        out: the directory to write or replace, at once.

    Raises:
        ShardError: the dataset is damaged, or a shard is larger than Arrow's lists.
        StoreError: pyarrow is not installed, or `out` cannot be written.
    """
    _check_pyarrow()
    check_replaceable(out, *OWNED)
    check_apart(out, [directory])
    manifest = read_manifest(directory)
    _check_sizes(directory, manifest)
    with atomic_directory(out, *OWNED) as temporary:
        for shard in manifest.shards:
            check_shard(directory, manifest, shard)
            content = _parquet(_table(directory, manifest, shard))
            write_atomically((temporary / shard.name).with_suffix(".parquet"), content)
        copy_file(directory / MANIFEST, temporary / MANIFEST)
    return manifest


def _check_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401 (whether it is there)
    except ImportError:
        raise StoreError("pyarrow is not installed: pip install '.[parquet]'") from None


def _check_sizes(directory: Path, manifest: Manifest) -> None:
    for shard in manifest.shards:
        for name, column in manifest.columns.items():
            if shard.rows * prod(column.shape) > LARGEST_COLUMN:
                raise ShardError(
                    f"{directory / shard.name}: column '{name}' has more than {LARGEST_COLUMN} numbers, which lists of "
                    "Arrow cannot hold: make shards of fewer rows (attack.rows_per_shard)"
                )


def _parquet(table: pyarrow.Table) -> bytes:
    """Return the bytes of a file: made in memory, so that a full disk is met where all other files are written."""
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink, compression=COMPRESSION)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _table(directory: Path, manifest: Manifest, shard: ShardEntry) -> pyarrow.Table:
    import pyarrow

    attributes = attributes_of(manifest.format_version, manifest.fingerprint, shard.view, shard.block)
    columns = _columns_of(manifest)
    values = read_columns(directory / shard.name, manifest.columns, attributes)
    values["view"] = np.full(shard.rows, shard.view)
    arrays = [_array(values[name].astype(column.dtype, copy=False)) for name, column in columns.items()]
    fields = [
        pyarrow.field(name, array.type, metadata=_array_type(column))
        for (name, column), array in zip(columns.items(), arrays, strict=True)
    ]
    metadata = {"huggingface": json.dumps(_features(columns, manifest.class_names)), "shard": json.dumps(attributes)}
    return pyarrow.Table.from_arrays(arrays, schema=pyarrow.schema(fields, metadata=metadata))


def _columns_of(manifest: Manifest) -> dict[str, Column]:
    """Return the columns of a file."""
    return {"view": Column("int32", (), "number of the view"), **columns_in_order(manifest)}


def _array(values: NDArray[Any]) -> pyarrow.Array:
    """Return values (N, ...) as N numbers, lists of a fixed length, or lists of lists.

    These are of any length, as Hugging Face's type of an array says.
    """
    import pyarrow

    array = pyarrow.array(values.reshape(-1))
    if values.ndim == 2:
        return pyarrow.FixedSizeListArray.from_arrays(array, values.shape[1])
    for length in reversed(values.shape[1:]):
        ends = np.arange(0, len(array) + 1, length, dtype=np.int32)
        array = pyarrow.ListArray.from_arrays(ends, array)
    return array


def _array_type(column: Column) -> dict[str, str] | None:
    """Return what marks a field of lists of lists as an array of a known shape."""
    if len(column.shape) < 2:
        return None
    return {
        "ARROW:extension:name": ARRAY_TYPE.format(len(column.shape)),
        "ARROW:extension:metadata": json.dumps([column.shape, column.dtype]),
    }


def _features(columns: Mapping[str, Column], class_names: list[str]) -> dict[str, Any]:
    """Return what Hugging Face's library reads of a schema: the type of every column."""
    features = {name: _feature(column) for name, column in columns.items()}
    features["label"] = {"_type": "ClassLabel", "names": class_names}
    return {"info": {"features": features}}


def _feature(column: Column) -> dict[str, Any]:
    value = {"_type": "Value", "dtype": column.dtype}
    if not column.shape:
        return value
    if len(column.shape) == 1:
        return {"_type": "Sequence", "feature": value, "length": column.shape[0]}
    return {"_type": ARRAY_FEATURE.format(len(column.shape)), "shape": column.shape, "dtype": column.dtype}
