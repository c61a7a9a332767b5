"""A few rows of a sample dataset, drawn at random, as a small dataset of its own: a preview."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import ParameterError
from pipeline.core.files import atomic_directory
from pipeline.core.parameters import Card
from pipeline.core.provenance import fingerprint
from pipeline.publish.card import CARD_FILES, DATASET_FILES, EMPTY_CARD
from pipeline.publish.rewrite import Columns, WholeDataset, check_out, finish, read_shard, read_whole, write_block
from pipeline.shards.check import check_shard
from pipeline.shards.manifest import Manifest
from pipeline.shards.order import shards_in_order


def sample_rows(directory: Path, rows: int, seed: int, out: Path, card: Card = EMPTY_CARD) -> Manifest:
    """Draw rows of all views of a dataset, without replacement, as a small dataset of one view.

    Rows come in the order of the dataset, with all columns as they were (`index` too), in blocks as large as the
    dataset's. The parameters say `sample`: the fingerprint of the dataset, rows and seed.

    Args:
        directory: the dataset; shards that rows are taken from are checked.
        rows: how many.
        seed: of the draw.
        out: the directory to write or replace, at once.
        card: what is stated of the images.

    Raises:
        ParameterError: the dataset has fewer rows, or a number is out of range.
        ShardError: the dataset is damaged, or is a sample itself.
        StoreError: `out` cannot be written.
    """
    check_out(out, [directory])
    dataset = read_whole(directory)
    total = dataset.manifest.totals.rows
    if not 1 <= rows <= total:
        raise ParameterError(f"-n: expected 1 to {total}, which is all rows of {directory}, got {rows}")
    if seed < 0:
        raise ParameterError(f"--seed: expected 0 or more, got {seed}")
    drawn = np.sort(np.random.default_rng(seed).choice(total, rows, replace=False))
    manifest = _sample_manifest(dataset, drawn, seed)
    with atomic_directory(out, *DATASET_FILES, beside=CARD_FILES) as temporary:
        blocks = enumerate(_blocks_of(dataset, drawn))
        shards = [write_block(temporary, manifest, values, 0, block) for block, values in blocks]
        return finish(temporary, manifest, shards, card)


def _sample_manifest(dataset: WholeDataset, drawn: NDArray[np.int64], seed: int) -> Manifest:
    """Return the manifest, but for its shards."""
    manifest = dataset.manifest
    parameters = manifest.parameters | {
        "sample": {"fingerprint": manifest.fingerprint, "rows": len(drawn), "seed": seed}
    }
    # The rows themselves count: another version of numpy may draw others for the same seed.
    digest = fingerprint(manifest.format_version, parameters, manifest.digests.model_dump(), drawn.tolist())
    changes = {"parameters": parameters, "fingerprint": digest, "rows": len(drawn), "views": 1}
    return manifest.model_copy(update=changes)


def _blocks_of(dataset: WholeDataset, drawn: NDArray[np.int64]) -> Iterator[Columns]:
    """Yield the rows with these numbers (ascending, over all views), in blocks as large as those of the dataset."""
    shards = shards_in_order(dataset.manifest)
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
            parts.append({name: values[offsets] for name, values in read_shard(dataset, shard).items()})
        yield {name: np.concatenate([part[name] for part in parts]) for name in dataset.manifest.columns}
