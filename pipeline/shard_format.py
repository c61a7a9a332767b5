"""The format of a sample dataset: columns, manifest, and the check of a directory against them.

A dataset is a directory of HDF5 shards and a `manifest.json`. Everything here works without torch, so a check starts
at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ShardError
from pipeline.status import Status
from pipeline.storage import file_digest

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 64 << 20  # bytes; a million shards need about 300 MB of manifest and another format
SHARD_NAME = r"view-\d{3,}-block-\d{5,}\.h5"
DIGEST = r"^[0-9a-f]{64}$"


class Column(NamedTuple):
    """One column of a shard: row-first, `shape` is that of one row."""

    dtype: str
    shape: tuple[int, ...]
    meaning: str


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Augmentation(_Strict):
    """How views were drawn: a random crop after black padding, and a random mirror image."""

    padding: int = Field(ge=0)
    flip: bool


class Digests(_Strict):
    """What the samples were made from."""

    teacher: str = Field(pattern=DIGEST, description="sha256 of the teacher's weights file")
    train: str = Field(pattern=DIGEST, description="content digest of the prepared training split")


class ShardEntry(_Strict):
    """One shard: block `block` of the training split under view `view`."""

    name: str = Field(pattern=f"^{SHARD_NAME}$")
    view: int = Field(ge=0)
    block: int = Field(ge=0)
    rows: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=DIGEST)
    statuses: dict[str, int]


class Totals(_Strict):
    """Sums over all shards."""

    shards: int
    rows: int
    samples: int
    bytes: int
    statuses: dict[str, int]


class Manifest(_Strict):
    """What a dataset consists of and how it was made; nothing in it changes without a change of content."""

    format_version: int
    fingerprint: str = Field(pattern=DIGEST)
    columns: dict[str, Column]
    parameters: dict[str, Any]
    class_names: list[str] = Field(min_length=2)
    image_shape: tuple[int, int, int]
    mean: list[float]
    std: list[float]
    augmentation: Augmentation
    digests: Digests
    rows: int = Field(ge=1, description="of the training split")
    views: int = Field(ge=1)
    targets: int = Field(ge=1)
    shards: list[ShardEntry]
    totals: Totals


def columns_of(image_shape: tuple[int, int, int], classes: int, targets: int, embed_images: bool) -> dict[str, Column]:
    """The columns of a shard, in order, for images of `image_shape` (C, H, W) and `targets` target classes a view."""
    columns = {
        "index": Column("uint32", (), "row in the prepared training split"),
        "label": Column("int64", (), "base class"),
        "image": Column("uint8", image_shape, "the view"),
        "crop": Column("int16", (2,), "top and left of the view in the padded image"),
        "flip": Column("uint8", (), "1 where the view is mirrored left to right"),
        "teacher_logits": Column("float32", (classes,), "on the view"),
        "target": Column("int16", (targets,), "target class, -1 without a search"),
        "delta": Column("int8", (targets, *image_shape), "perturbation divided by delta_scale"),
        "delta_scale": Column("float32", (targets,), "sample = image / 255 + delta * delta_scale"),
        "boundary_logits": Column("float32", (targets, classes), "of the teacher, at the stored sample"),
        "margin": Column("float32", (targets,), "base logit minus target logit, at the stored sample"),
        "distance": Column("float32", (targets,), "L2 norm of the perturbation in pixel space [0, 1]"),
        "status": Column("uint8", (targets,), ", ".join(f"{s.value} {s.name.lower()}" for s in Status)),
        "evaluations": Column("uint16", (targets,), "gradient evaluations of the search"),
    }
    if not embed_images:
        del columns["image"]
    return columns


def shard_name(view: int, block: int) -> str:
    """The file name of a shard."""
    return f"view-{view:03d}-block-{block:05d}.h5"


def count_statuses(status: NDArray[np.uint8]) -> dict[str, int]:
    """How many samples ended in each status, by name."""
    return {s.name.lower(): int(np.count_nonzero(status == s)) for s in Status}


def totals_of(shards: list[ShardEntry], targets: int) -> Totals:
    """Sum up the shards of a manifest."""
    rows = sum(shard.rows for shard in shards)
    statuses = {s.name.lower(): sum(shard.statuses.get(s.name.lower(), 0) for shard in shards) for s in Status}
    return Totals(
        shards=len(shards),
        rows=rows,
        samples=rows * targets,
        bytes=sum(shard.bytes for shard in shards),
        statuses=statuses,
    )


def manifest_text(manifest: Manifest) -> str:
    """The manifest as it is written: sorted, indented, the same bytes for the same content."""
    return json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a dataset.

    Raises:
        ShardError: it is missing, damaged, inconsistent or of a format version that is not known here.
    """
    path = directory / MANIFEST
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise ShardError(f"{path}: larger than {LARGEST_MANIFEST >> 20} MiB, refused")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror}); is {directory} a sample dataset?") from None
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}: not valid JSON ({error})") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise ShardError(f"{path}: format version {version!r}, this software reads version {FORMAT_VERSION}")
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ShardError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    _check_consistent(manifest, path)
    return manifest


def _check_consistent(manifest: Manifest, path: Path) -> None:
    expected = columns_of(
        manifest.image_shape, len(manifest.class_names), manifest.targets, "image" in manifest.columns
    )
    if {name: c[:2] for name, c in manifest.columns.items()} != {name: c[:2] for name, c in expected.items()}:
        raise ShardError(f"{path}: the columns are not those of format version {FORMAT_VERSION}")
    channels = manifest.image_shape[0]
    if min(manifest.image_shape) < 1 or len(manifest.mean) != channels or len(manifest.std) != channels:
        raise ShardError(f"{path}: image shape, mean and deviation do not fit each other")
    if not all(np.isfinite(manifest.mean)) or not all(0 < value < np.inf for value in manifest.std):
        raise ShardError(f"{path}: mean or deviation is out of range")
    if manifest.views > len(manifest.shards):
        raise ShardError(f"{path}: {manifest.views} views, but only {len(manifest.shards)} shards")
    blocks = {(shard.view, shard.block): shard for shard in manifest.shards}
    per_view = len(manifest.shards) // manifest.views
    complete = {(view, block) for view in range(manifest.views) for block in range(per_view)}
    if blocks.keys() != complete or len(manifest.shards) != len(complete):
        raise ShardError(f"{path}: the shards are not {manifest.views} views of {per_view} blocks each")
    if any(shard.name != shard_name(shard.view, shard.block) for shard in manifest.shards):
        raise ShardError(f"{path}: a shard's name does not say its view and block")
    for view in range(manifest.views):
        if sum(blocks[view, block].rows for block in range(per_view)) != manifest.rows:
            raise ShardError(f"{path}: the blocks of view {view} do not add up to {manifest.rows} rows")
    if manifest.totals != totals_of(manifest.shards, manifest.targets):
        raise ShardError(f"{path}: the totals are not the sums over the shards")


def check_shard(directory: Path, manifest: Manifest, shard: ShardEntry) -> None:
    """Check one file against the manifest: size and digest first, then what is inside.

    Raises:
        ShardError: names the file and what is wrong.
    """
    path = directory / shard.name
    if not path.is_file():
        raise ShardError(f"{path}: missing")
    size = path.stat().st_size
    if size != shard.bytes:
        raise ShardError(f"{path}: has {size} bytes, the manifest says {shard.bytes}")
    if file_digest(path) != shard.sha256:
        raise ShardError(f"{path}: its sha256 is not the manifest's: the content has changed")
    try:
        with h5py.File(path, "r") as file:
            _check_contents(file, path, manifest, shard)
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{path}: not a readable shard ({error})") from None


def attributes_of(fingerprint: str, view: int, block: int) -> dict[str, Any]:
    """The attributes of a shard."""
    return {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "view": view, "block": block}


def is_shard(path: Path, fingerprint: str, view: int, block: int) -> bool:
    """Whether a file says of itself that it is a certain shard."""
    try:
        with h5py.File(path, "r") as file:
            return all(file.attrs.get(name) == v for name, v in attributes_of(fingerprint, view, block).items())
    except OSError:
        return False


def _check_contents(file: h5py.File, path: Path, manifest: Manifest, shard: ShardEntry) -> None:
    for name, value in attributes_of(manifest.fingerprint, shard.view, shard.block).items():
        if file.attrs.get(name) != value:
            raise ShardError(f"{path}: attribute '{name}' is {file.attrs.get(name)!r}, expected {value!r}")
    if set(file) != set(manifest.columns):
        different = sorted(set(file) ^ set(manifest.columns))
        raise ShardError(f"{path}: columns are not the manifest's: {', '.join(different)}")
    for name, column in manifest.columns.items():
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise ShardError(f"{path}: column '{name}' is a link to elsewhere")
        dataset = file[name]
        if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
            raise ShardError(f"{path}: column '{name}' is no dataset of this file")
        if dataset.dtype != np.dtype(column.dtype) or dataset.shape != (shard.rows, *column.shape):
            raise ShardError(
                f"{path}: column '{name}' is {dataset.dtype} {dataset.shape}, "
                f"expected {column.dtype} {(shard.rows, *column.shape)}"
            )


def find_problems(directory: Path, manifest: Manifest) -> list[str]:
    """Check every file of a dataset; one sentence for each that is wrong, none for a whole dataset."""
    problems = []
    for shard in manifest.shards:
        try:
            check_shard(directory, manifest, shard)
        except ShardError as error:
            problems.append(str(error))
    listed = {shard.name for shard in manifest.shards}
    problems += [f"{path}: not in the manifest" for path in sorted(directory.glob("*.h5")) if path.name not in listed]
    return problems
