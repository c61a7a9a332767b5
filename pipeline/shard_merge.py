"""New sample datasets from finished ones: the views of several contributors together, or a few rows as a preview.

What comes out is a dataset like any other. Its shards are written again, one at a time, since a shard names the
fingerprint of its dataset; its parameters say what it was put together from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from pipeline.errors import ParameterError, ShardError, StoreError
from pipeline.provenance import fingerprint
from pipeline.shard_check import check_shard
from pipeline.shard_file import read_columns
from pipeline.shard_format import (
    DIGEST,
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    ShardEntry,
    attributes_of,
    columns_of,
    count_statuses,
    manifest_text,
    read_manifest,
    shard_name,
    totals_of,
)
from pipeline.shard_writer import write_shard
from pipeline.storage import atomic_directory, check_replaceable, file_digest, write_atomically

OWNED = ("*.h5", MANIFEST, "README.md", "croissant.json")  # names in a published dataset
NOT_SHARED = {"fingerprint", "views", "shards", "totals"}  # fields of a manifest in which merged datasets may differ
LONGEST_VALUE = 100  # characters of a value in an error

Columns = dict[str, NDArray[Any]]


class _Source(BaseModel):
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
    merged: list[_Source] = []
    sample: dict[str, Any] | None = None


class _Dataset(NamedTuple):
    directory: Path
    manifest: Manifest
    parameters: _Parameters


class _View(NamedTuple):
    """View `number` of a dataset, and what it was before that was merged: view `view` under a fingerprint."""

    dataset: _Dataset
    number: int
    fingerprint: str
    seed: int
    view: int


def merge(directories: Sequence[Path], out: Path) -> Manifest:
    """Put the views of several datasets of the same teacher, data and parameters into one.

    Only the seed of the views may differ. Views are numbered anew in the order given; one that is there twice (the same
    view of the same fingerprint) is taken once, from where it comes first. To merge step by step is to merge at once.
    The parameters have no `attack.seed` then, but a list `merged` of the sources in order: fingerprint, seed and views
    of each. Datasets that all have the same fingerprint keep it, with their parameters.

    A manifest holds no digest of the code that made it but in its fingerprint, which covers the seed, so different code
    is only noticed, and refused, where it made the same draw of views. Each sample was judged by the teacher as it was
    stored, whatever code found it.

    Args:
        directories: two or more datasets; each is checked in full before anything is written.
        out: the directory to write or replace, at once; none of the datasets.

    Raises:
        ParameterError: there is nothing to merge.
        ShardError: a dataset is damaged, does not fit the first one, or has other contents for the same views.
        StoreError: `out` cannot be written.
    """
    if len(directories) < 2:
        raise ParameterError(f"merge: expected two or more datasets, got {len(directories)}")
    _check_out(out, directories)
    datasets = [_read_dataset(directory) for directory in directories]
    for dataset in datasets:
        _check_fits(datasets[0], dataset)
    views = _different_views(datasets)
    for dataset in datasets:
        for shard in dataset.manifest.shards:
            check_shard(dataset.directory, dataset.manifest, shard)
    manifest = _merged_manifest(datasets, views)
    with atomic_directory(out, *OWNED) as temporary:
        shards = [
            _write_shard(temporary, manifest, _read_shard(view.dataset, shard), number, shard.block)
            for number, view in enumerate(views)
            for shard in _ordered(view.dataset.manifest)
            if shard.view == view.number
        ]
        return _write_manifest(temporary, manifest, shards)


def sample(directory: Path, rows: int, seed: int, out: Path) -> Manifest:
    """Draw rows of all views of a dataset, without replacement, as a small dataset of one view.

    Rows come in the order of the dataset, with all columns as they were (`index` too), in blocks as large as the
    dataset's. The parameters say `sample`: the fingerprint of the dataset, rows and seed.

    Args:
        directory: the dataset; shards that rows are taken from are checked.
        rows: how many.
        seed: of the draw.
        out: the directory to write or replace, at once.

    Raises:
        ParameterError: the dataset has fewer rows, or a number is out of range.
        ShardError: the dataset is damaged, or is a sample itself.
        StoreError: `out` cannot be written.
    """
    _check_out(out, [directory])
    dataset = _read_dataset(directory)
    total = dataset.manifest.totals.rows
    if not 1 <= rows <= total:
        raise ParameterError(f"-n: expected 1 to {total}, which is all rows of {directory}, got {rows}")
    if seed < 0:
        raise ParameterError(f"--seed: expected 0 or more, got {seed}")
    drawn = np.sort(np.random.default_rng(seed).choice(total, rows, replace=False))
    manifest = _sample_manifest(dataset, drawn, seed)
    with atomic_directory(out, *OWNED) as temporary:
        blocks = enumerate(_blocks_of(dataset, drawn))
        shards = [_write_shard(temporary, manifest, values, 0, block) for block, values in blocks]
        return _write_manifest(temporary, manifest, shards)


def _check_out(out: Path, directories: Sequence[Path]) -> None:
    for directory in directories:
        if out.resolve() == directory.resolve():
            raise StoreError(f"{out}: is a dataset that is read here ({directory}): choose another folder")
    check_replaceable(out, *OWNED)


def _read_dataset(directory: Path) -> _Dataset:
    """A dataset of whole views, made or merged here."""
    manifest = read_manifest(directory)
    try:
        parameters = _Parameters.model_validate(manifest.parameters)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, ("parameters", *first["loc"])))
        raise ShardError(f"{directory / MANIFEST}: {name}: {first['msg']}") from None
    if parameters.sample is not None:
        raise ShardError(
            f"{directory}: is a sample of another dataset ({manifest.rows} rows): take the dataset it was drawn from"
        )
    # As they were written: a manifest has its columns by name, and their order decides the bytes of a shard.
    columns = columns_of(manifest.image_shape, len(manifest.class_names), manifest.targets, "image" in manifest.columns)
    return _Dataset(directory, manifest.model_copy(update={"columns": columns}), parameters)


def _check_fits(first: _Dataset, other: _Dataset) -> None:
    ours, theirs = _shared_fields(first.manifest), _shared_fields(other.manifest)
    for name in ours | theirs:
        if (our := _text(ours, name)) != (their := _text(theirs, name)):
            raise ShardError(
                f"{other.directory}: {name} is {_short(their)}, but {_short(our)} in {first.directory}: only views of "
                "the same teacher, data and parameters can be merged"
            )


def _shared_fields(manifest: Manifest) -> dict[str, Any]:
    """What datasets must have in common to be merged, by dotted name."""
    values = manifest.model_dump(mode="json", exclude=NOT_SHARED)
    values["parameters"].pop("merged", None)
    values["parameters"]["attack"].pop("seed", None)
    values["columns"] = values.pop("columns")  # last: where they differ, parameters do, and say why
    by_view = [
        [shard.rows for shard in shards] for _, shards in groupby(_ordered(manifest), key=lambda shard: shard.view)
    ]
    values["rows of the blocks"] = by_view[0] if all(rows == by_view[0] for rows in by_view) else by_view
    return dict(_flat(values))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _text(values: dict[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "absent"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _different_views(datasets: list[_Dataset]) -> list[_View]:
    """The views of all datasets in order, each draw once."""
    taken: dict[tuple[int, int], _View] = {}
    for dataset in datasets:
        for view in _views_of(dataset):
            known = taken.setdefault((view.seed, view.view), view)
            if known.fingerprint != view.fingerprint:
                raise ShardError(
                    f"{dataset.directory}: fingerprint of view {view.number} is {view.fingerprint}, but "
                    f"{known.fingerprint} in {known.dataset.directory} (view {known.number}): the same draw (seed "
                    f"{view.seed}, view {view.view}) made by other code: make one of them again, with another seed"
                )
    return list(taken.values())


def _views_of(dataset: _Dataset) -> list[_View]:
    directory, manifest, parameters = dataset
    seed, sources = parameters.attack.seed, parameters.merged
    if not sources and seed is not None:
        sources = [_Source(fingerprint=manifest.fingerprint, seed=seed, views=list(range(manifest.views)))]
    origins = [(source.fingerprint, source.seed, view) for source in sources for view in source.views]
    if len(origins) != manifest.views:
        raise ShardError(
            f"{directory / MANIFEST}: parameters say of {len(origins)} of {manifest.views} views by which seed they "
            "were drawn (attack.seed or merged)"
        )
    return [_View(dataset, number, *origin) for number, origin in enumerate(origins)]


def _merged_manifest(datasets: list[_Dataset], views: list[_View]) -> Manifest:
    """The manifest, but for its shards."""
    first = datasets[0].manifest
    changes: dict[str, Any] = {"views": len(views)}
    if any(dataset.manifest.fingerprint != first.fingerprint for dataset in datasets):
        attack = {name: value for name, value in first.parameters["attack"].items() if name != "seed"}
        sources = [
            {"fingerprint": digest, "seed": seed, "views": [view.view for view in group]}
            for (digest, seed), group in groupby(views, key=lambda view: (view.fingerprint, view.seed))
        ]
        changes["parameters"] = first.parameters | {"attack": attack, "merged": sources}
        changes["fingerprint"] = fingerprint(FORMAT_VERSION, changes["parameters"], first.digests.model_dump())
    return first.model_copy(update=changes)


def _sample_manifest(dataset: _Dataset, drawn: NDArray[np.int64], seed: int) -> Manifest:
    """The manifest, but for its shards."""
    manifest = dataset.manifest
    parameters = manifest.parameters | {
        "sample": {"fingerprint": manifest.fingerprint, "rows": len(drawn), "seed": seed}
    }
    # The rows themselves count: another version of numpy may draw others for the same seed.
    digest = fingerprint(FORMAT_VERSION, parameters, manifest.digests.model_dump(), drawn.tolist())
    changes = {"parameters": parameters, "fingerprint": digest, "rows": len(drawn), "views": 1}
    return manifest.model_copy(update=changes)


def _blocks_of(dataset: _Dataset, drawn: NDArray[np.int64]) -> Iterator[Columns]:
    """The rows with these numbers (ascending, over all views), in blocks as large as those of the dataset."""
    shards = _ordered(dataset.manifest)
    ends = np.cumsum([shard.rows for shard in shards])
    size = max(shard.rows for shard in shards)
    for start in range(0, len(drawn), size):
        rows = drawn[start : start + size]
        of_shard = np.searchsorted(ends, rows, side="right")
        parts = []
        for number in np.unique(of_shard):
            shard = shards[number]
            check_shard(dataset.directory, dataset.manifest, shard)
            offsets = rows[of_shard == number] - (ends[number] - shard.rows)
            parts.append({name: values[offsets] for name, values in _read_shard(dataset, shard).items()})
        yield {name: np.concatenate([part[name] for part in parts]) for name in dataset.manifest.columns}


def _ordered(manifest: Manifest) -> list[ShardEntry]:
    return sorted(manifest.shards, key=lambda shard: (shard.view, shard.block))


def _read_shard(dataset: _Dataset, shard: ShardEntry) -> Columns:
    """All columns of a shard, as stored."""
    directory, manifest, _ = dataset
    attributes = attributes_of(manifest.fingerprint, shard.view, shard.block)
    values = read_columns(directory / shard.name, manifest.columns, attributes)
    return {name: values[name].astype(column.dtype, copy=False) for name, column in manifest.columns.items()}


def _write_shard(directory: Path, manifest: Manifest, values: Columns, view: int, block: int) -> ShardEntry:
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
        statuses=count_statuses(values["status"]),
    )


def _write_manifest(directory: Path, manifest: Manifest, shards: list[ShardEntry]) -> Manifest:
    """Write the manifest of these shards, last of all; returns it as readers will have it."""
    changes = {"shards": shards, "totals": totals_of(shards, manifest.targets)}
    write_atomically(directory / MANIFEST, manifest_text(manifest.model_copy(update=changes)))
    return read_manifest(directory)
