"""Reading finished datasets of whole views, and writing new ones from their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from pipeline.core.errors import ShardError
from pipeline.core.files import check_apart, check_replaceable, file_digest, write_atomically
from pipeline.core.parameters import Card
from pipeline.core.text import first_problem
from pipeline.publish.card import CARD_FILES, DATASET_FILES, write_card
from pipeline.publish.writer import write_shard
from pipeline.shards.file import read_columns
from pipeline.shards.format import MANIFEST, attributes_of, count_statuses, shard_name
from pipeline.shards.manifest import (
    DIGEST,
    Manifest,
    ShardEntry,
    columns_in_order,
    manifest_text,
    read_manifest,
    totals_of,
)

Columns = dict[str, NDArray[Any]]


class Origin(BaseModel):
    """Views of a merged dataset that came, in this order, from one dataset."""

    fingerprint: str = Field(pattern=DIGEST)
    seed: int
    views: list[int]


class _Attack(BaseModel):
    seed: int | None = None
    compression: Literal["none", "gzip"]


class _Parameters(BaseModel):
    """What is read here of the parameters in a manifest, which a stranger may have written."""

    attack: _Attack
    merged: list[Origin] = []
    sample: dict[str, Any] | None = None


class WholeDataset(NamedTuple):
    """A dataset that is no sample of another one; its columns are in order."""

    directory: Path
    manifest: Manifest
    parameters: _Parameters


def check_out(out: Path, directories: Sequence[Path]) -> None:
    """Refuse a folder for a new dataset that holds one of those that are read, or something of somebody else.

    Raises:
        StoreError: names path and reason.
    """
    check_replaceable(out, *DATASET_FILES, beside=CARD_FILES)
    check_apart(out, directories)


def read_whole(directory: Path) -> WholeDataset:
    """Read the manifest of a dataset of whole views.

    Raises:
        ShardError: it is damaged, does not say how it was made, or is of a sample.
    """
    manifest = read_manifest(directory)
    try:
        parameters = _Parameters.model_validate(manifest.parameters)
    except ValidationError as error:
        raise ShardError(f"{directory / MANIFEST}: {first_problem(error, 'parameters')}") from None
    if parameters.sample is not None:
        raise ShardError(
            f"{directory}: is a sample of another dataset ({manifest.rows} rows): take the dataset it was drawn from"
        )
    # The order of columns decides the bytes of a shard.
    return WholeDataset(directory, manifest.model_copy(update={"columns": columns_in_order(manifest)}), parameters)


def read_shard(dataset: WholeDataset, shard: ShardEntry) -> Columns:
    """Return all columns of a shard, as stored."""
    directory, manifest, _ = dataset
    attributes = attributes_of(manifest.format_version, manifest.fingerprint, shard.view, shard.block)
    values = read_columns(directory / shard.name, manifest.columns, attributes)
    return {name: values[name].astype(column.dtype, copy=False) for name, column in manifest.columns.items()}


def write_block(directory: Path, manifest: Manifest, values: Columns, view: int, block: int) -> ShardEntry:
    """Write a shard of the dataset of a manifest; returns the manifest's row for it."""
    path = directory / shard_name(view, block)
    write_shard(
        path,
        values,
        manifest.columns,
        fingerprint=manifest.fingerprint,
        view=view,
        block=block,
        compression=manifest.parameters["attack"]["compression"],
    )
    return ShardEntry(
        name=path.name,
        view=view,
        block=block,
        rows=len(values["index"]),
        bytes=path.stat().st_size,
        sha256=file_digest(path),
        statuses=count_statuses(values),
    )


def finish(directory: Path, manifest: Manifest, shards: list[ShardEntry], card: Card) -> Manifest:
    """Write the card of these shards and, last of all, their manifest; returns it as readers will have it."""
    manifest = manifest.model_copy(update={"shards": shards, "totals": totals_of(shards, manifest.targets)})
    write_card(directory, manifest, card)
    write_atomically(directory / MANIFEST, manifest_text(manifest))
    return read_manifest(directory)
