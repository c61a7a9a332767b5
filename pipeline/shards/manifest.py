"""The manifest of a sample dataset: what it consists of, and how it was made.

It is read with suspicion: it may come from a stranger. Nothing here needs torch, so a check starts at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from pipeline.core.errors import ShardError, shown
from pipeline.core.status import Status
from pipeline.core.text import first_problem
from pipeline.shards.folder import Folder, as_folder
from pipeline.shards.format import MANIFEST, SHARD_NAME, VERSIONS, Column, columns_of, shard_name, version_of
from pipeline.shards.limits import (
    LARGEST_MANIFEST,
    LARGEST_SHARD,
    MOST_CLASSES,
    MOST_LISTS,
    MOST_PADDING,
    MOST_PIXELS,
    MOST_ROWS,
    MOST_VALUES,
)

DIGEST = r"^[0-9a-f]{64}$"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Augmentation(_Strict):
    """How views were drawn: a random crop after black padding, or one that was resized; mirror images; colours."""

    padding: int = Field(ge=0)
    flip: bool
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (0.75, 1.3333)
    jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    image_size: tuple[int, int] | None = Field(None, description="of the images, where they were larger than views")

    @model_serializer(mode="wrap")
    def _what_is_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is as in format version 1."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        return {name: value for name, value in handler(self).items() if getattr(self, name) != defaults[name]}


class Digests(_Strict):
    """What the samples were made from."""

    teacher: str = Field(pattern=DIGEST, description="sha256 of the teacher's weights file")
    train: str = Field(pattern=DIGEST, description="content digest of the prepared training split")


class ShardEntry(_Strict):
    """One shard: block `block` of the training split under view `view`."""

    name: str = Field(pattern=f"^{SHARD_NAME}$")
    view: int = Field(ge=0)
    block: int = Field(ge=0)
    rows: int = Field(ge=1, le=MOST_ROWS)
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
    targets: int = Field(ge=0)
    shards: list[ShardEntry]
    totals: Totals

    @functools.cached_property
    def starts(self) -> dict[tuple[int, int], int]:
        """The first row of each (view, block) within its view."""
        starts, found = dict[int, int](), {}
        for shard in sorted(self.shards, key=lambda shard: (shard.view, shard.block)):
            found[shard.view, shard.block] = starts.get(shard.view, 0)
            starts[shard.view] = found[shard.view, shard.block] + shard.rows
        return found

    @property
    def is_sample(self) -> bool:
        """Whether its rows were drawn from the views of a whole dataset, `rows` of them as one view."""
        return self.parameters.get("sample") is not None


def columns_in_order(manifest: Manifest) -> dict[str, Column]:
    """Return the columns of a dataset as the format has them: a manifest that was read has them by name."""
    rule, given = manifest.augmentation, manifest.columns
    sizes = manifest.image_shape, len(manifest.class_names), manifest.targets
    halved = "teacher_logits" in given and given["teacher_logits"].dtype == "float16"
    logits = "float16" if halved else "float32"
    shape = given["teacher_features"].shape if "teacher_features" in given else ()
    features = shape[0] if len(shape) == 1 else 0
    return columns_of(*sizes, "image" in given, rule, rule.image_size, logits, features)


def totals_of(shards: list[ShardEntry], targets: int) -> Totals:
    """Sum up the shards of a manifest."""
    rows = sum(shard.rows for shard in shards)
    names = [status.name.lower() for status in Status]
    statuses = {name: sum([shard.statuses.get(name, 0) for shard in shards]) for name in names}
    return Totals(
        shards=len(shards),
        rows=rows,
        samples=rows * targets,
        bytes=sum(shard.bytes for shard in shards),
        statuses=statuses,
    )


def manifest_text(manifest: Manifest) -> str:
    """Return the manifest as it is written: sorted, indented, the same bytes for the same content."""
    return json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False) + "\n"


def manifest_digest(manifest: Manifest) -> str:
    """Return the sha256 of the manifest as it is written, in hexadecimal: it stands for all content of a dataset."""
    return hashlib.sha256(manifest_text(manifest).encode()).hexdigest()


def read_manifest(directory: Path | Folder) -> Manifest:
    """Read and check the manifest of a dataset.

    Raises:
        ShardError: it is missing, damaged, inconsistent or of a format version that is not known here.
    """
    folder = as_folder(directory)
    path = f"{folder}/{MANIFEST}"
    try:
        source = folder.open(MANIFEST)
        with contextlib.closing(source):
            if source.size > LARGEST_MANIFEST:
                raise ShardError(f"{path}: larger than {LARGEST_MANIFEST >> 20} MiB, refused")
            content = bytearray(source.size)
            source.read_into(memoryview(content), 0)
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror or error}); is {folder} a sample dataset?") from None
    # A shard takes 350 bytes, with 2 objects and 13 commas; class names may contain some of their own.
    most = {b"[": MOST_LISTS, b"{": MOST_LISTS + len(content) // 100, b",": MOST_VALUES + len(content) // 20}
    if any(content.count(sign) > count for sign, count in most.items()):
        raise ShardError(f"{path}: not a manifest: it has more lists, objects or values than one has")
    try:
        values = json.loads(
            content.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_refuse_repetition
        )
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}: not valid JSON ({error})") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version not in VERSIONS:
        raise ShardError(
            f"{path}: format version {shown(repr(version))}, this software reads versions up to {VERSIONS[-1]}"
        )
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        raise ShardError(f"{path}: {first_problem(error)}") from None
    _check_consistent(manifest, path)
    _check_writable(manifest, path)
    return manifest


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _refuse_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is there twice")
    return values


def _check_writable(manifest: Manifest, path: str) -> None:
    """Refuse what JSON can say, but no file of ours: numbers that overflow, halves of characters, endless nesting."""
    try:
        manifest_text(manifest.model_copy(update={"shards": []}))  # indenting is slow, and shards nest no deeper
        json.dumps(manifest.model_dump(), ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}: holds what cannot be written again ({error})") from None


def _check_consistent(manifest: Manifest, path: str) -> None:
    expected = columns_in_order(manifest)
    given = {name: c[:2] for name, c in manifest.columns.items()}
    if given != {name: c[:2] for name, c in expected.items()} or version_of(expected) != manifest.format_version:
        raise ShardError(f"{path}: the columns are not those of format version {manifest.format_version}")
    _check_sizes(manifest, path)
    channels = manifest.image_shape[0]
    if min(manifest.image_shape) < 1 or len(manifest.mean) != channels or len(manifest.std) != channels:
        raise ShardError(f"{path}: image shape, mean and deviation do not fit each other")
    # In float32 anything else would be zero or infinite.
    if not all(abs(value) <= 1e6 for value in manifest.mean) or not all(1e-6 <= value <= 1e6 for value in manifest.std):
        raise ShardError(f"{path}: mean or deviation is out of range")
    if manifest.augmentation.padding > max(MOST_PADDING, *manifest.image_shape[1:]):
        raise ShardError(f"{path}: padding {manifest.augmentation.padding} is more than an image")
    if len(set(manifest.class_names)) < len(manifest.class_names):
        raise ShardError(f"{path}: two classes have the same name")
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
    if not manifest.targets and any(any(shard.statuses.values()) for shard in manifest.shards):
        raise ShardError(f"{path}: counts samples, but has no target classes")
    if manifest.totals != totals_of(manifest.shards, manifest.targets):
        raise ShardError(f"{path}: the totals are not the sums over the shards")


def _check_sizes(manifest: Manifest, path: str) -> None:
    """Refuse what would take more memory than any real dataset, before anything is computed from it."""
    if max(manifest.image_shape) > MOST_PIXELS or len(manifest.class_names) > MOST_CLASSES:
        raise ShardError(f"{path}: images {manifest.image_shape} of {len(manifest.class_names)} classes are too large")
    if "teacher_features" in manifest.columns and not 0 < manifest.columns["teacher_features"].shape[0] <= MOST_VALUES:
        raise ShardError(f"{path}: column 'teacher_features' has an impossible number of values")
    if manifest.targets >= len(manifest.class_names):
        raise ShardError(f"{path}: {manifest.targets} target classes, but only {len(manifest.class_names)} classes")
    row_bytes = sum(np.dtype(c.dtype).itemsize * prod(c.shape) for c in manifest.columns.values())
    largest = max((shard.rows for shard in manifest.shards), default=0)
    if largest * row_bytes > LARGEST_SHARD:
        raise ShardError(f"{path}: a shard of {largest} rows of {row_bytes} bytes is too large")
