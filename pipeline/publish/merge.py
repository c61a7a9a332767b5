"""The views of several sample datasets together, as one dataset.

Shards are written again, one at a time, since a shard names the fingerprint of its dataset; the parameters say what
the dataset was put together from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.errors import ParameterError, ShardError, shown
from pipeline.core.files import atomic_directory
from pipeline.core.parameters import Card
from pipeline.core.provenance import fingerprint
from pipeline.core.text import leaves
from pipeline.publish.card import CARD_FILES, DATASET_FILES, EMPTY_CARD
from pipeline.publish.rewrite import Origin, WholeDataset, check_out, finish, read_shard, read_whole, write_block
from pipeline.shards.check import check_shard
from pipeline.shards.format import MANIFEST
from pipeline.shards.manifest import Manifest
from pipeline.shards.order import shards_in_order

NOT_SHARED = {"fingerprint", "views", "shards", "totals"}  # fields of a manifest in which merged datasets may differ
LONGEST_VALUE_SHOWN = 100  # characters of a value in an error


class _View(NamedTuple):
    """View `number` of a dataset, and what it was before that was merged: view `view` under a fingerprint."""

    dataset: WholeDataset
    number: int
    fingerprint: str
    seed: int
    view: int


def merge_datasets(directories: Sequence[Path], out: Path, card: Card = EMPTY_CARD) -> Manifest:
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
        card: what is stated of the images.

    Raises:
        ParameterError: there is nothing to merge.
        ShardError: a dataset is damaged, does not fit the first one, or has other contents for the same views.
        StoreError: `out` cannot be written.
    """
    if len(directories) < 2:
        raise ParameterError(f"merge: expected two or more datasets, got {len(directories)}")
    check_out(out, directories)
    datasets = [read_whole(directory) for directory in directories]
    for dataset in datasets:
        _check_fits(datasets[0], dataset)
    views = _different_views(datasets)
    for dataset in datasets:
        for shard in dataset.manifest.shards:
            check_shard(dataset.directory, dataset.manifest, shard)
    manifest = _merged_manifest(datasets, views)
    with atomic_directory(out, *DATASET_FILES, beside=CARD_FILES) as temporary:
        shards = [
            write_block(temporary, manifest, read_shard(view.dataset, shard), number, shard.block)
            for number, view in enumerate(views)
            for shard in shards_in_order(view.dataset.manifest)
            if shard.view == view.number
        ]
        return finish(temporary, manifest, shards, card)


def _check_fits(first: WholeDataset, other: WholeDataset) -> None:
    ours, theirs = _shared_fields(first.manifest), _shared_fields(other.manifest)
    for name in ours | theirs:
        if (our := _text(ours, name)) != (their := _text(theirs, name)):
            raise ShardError(
                f"{other.directory}: {shown(name)} is {shown(their, LONGEST_VALUE_SHOWN)}, but "
                f"{shown(our, LONGEST_VALUE_SHOWN)} in {first.directory}: only views of the same teacher, data and "
                "parameters can be merged"
            )


def _shared_fields(manifest: Manifest) -> dict[str, Any]:
    """Return what datasets must have in common to be merged, by dotted name."""
    values = manifest.model_dump(mode="json", exclude=NOT_SHARED)
    values["parameters"].pop("merged", None)
    values["parameters"]["attack"].pop("seed", None)
    values["columns"] = values.pop("columns")  # last: where they differ, parameters do, and say why
    views = groupby(shards_in_order(manifest), key=lambda shard: shard.view)
    by_view = [[shard.rows for shard in shards] for _, shards in views]
    values["rows of the blocks"] = by_view[0] if all(rows == by_view[0] for rows in by_view) else by_view
    return dict(leaves(values))


def _text(values: dict[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "absent"


def _different_views(datasets: list[WholeDataset]) -> list[_View]:
    """Return the views of all datasets in order, each draw once."""
    taken: dict[tuple[int, int], _View] = {}
    for dataset in datasets:
        for view in _views_of(dataset):
            known = taken.setdefault((view.seed, view.view), view)
            digests = {tuple(each) for each in (_shards_of(known), _shards_of(view)) if each}
            if known.fingerprint == view.fingerprint and len(digests) > 1:
                raise ShardError(
                    f"{dataset.directory}: view {view.number} has the fingerprint of view {known.number} of "
                    f"{known.dataset.directory}, but other content: one of the two is not what it says"
                )
            if known.fingerprint != view.fingerprint:
                raise ShardError(
                    f"{dataset.directory}: fingerprint of view {view.number} is {view.fingerprint}, but "
                    f"{known.fingerprint} in {known.dataset.directory} (view {known.number}): the same draw (seed "
                    f"{view.seed}, view {view.view}) made by other code: make one of them again, with another seed"
                )
    return list(taken.values())


def _shards_of(view: _View) -> list[str]:
    """Return digests of a view's shards; none where they were written again and name another dataset."""
    manifest = view.dataset.manifest
    if manifest.fingerprint != view.fingerprint:
        return []
    return [shard.sha256 for shard in shards_in_order(manifest) if shard.view == view.number]


def _views_of(dataset: WholeDataset) -> list[_View]:
    directory, manifest, parameters = dataset
    seed, sources = parameters.attack.seed, parameters.merged
    if not sources and seed is not None:
        sources = [Origin(fingerprint=manifest.fingerprint, seed=seed, views=list(range(manifest.views)))]
    origins = [(source.fingerprint, source.seed, view) for source in sources for view in source.views]
    if len(set(origins)) != manifest.views or len(origins) != manifest.views:
        raise ShardError(
            f"{directory / MANIFEST}: parameters say of {len(origins)} of {manifest.views} views by which seed they "
            "were drawn (attack.seed or merged)"
        )
    return [_View(dataset, number, *origin) for number, origin in enumerate(origins)]


def _merged_manifest(datasets: list[WholeDataset], views: list[_View]) -> Manifest:
    """Return the manifest, but for its shards."""
    first = datasets[0].manifest
    changes: dict[str, Any] = {"views": len(views)}
    if any(dataset.manifest.fingerprint != first.fingerprint for dataset in datasets):
        attack = {name: value for name, value in first.parameters["attack"].items() if name != "seed"}
        sources = [
            {"fingerprint": digest, "seed": seed, "views": [view.view for view in group]}
            for (digest, seed), group in groupby(views, key=lambda view: (view.fingerprint, view.seed))
        ]
        changes["parameters"] = first.parameters | {"attack": attack, "merged": sources}
        changes["fingerprint"] = fingerprint(first.format_version, changes["parameters"], first.digests.model_dump())
    return first.model_copy(update=changes)
