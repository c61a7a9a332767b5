"""The order of shards, and the order in which an epoch reads their rows."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.shards.manifest import Manifest, ShardEntry

WINDOW_SHARDS = 16  # rows are shuffled within so many shards, so that streaming needs no more memory


class Window(NamedTuple):
    """Shards whose rows are shuffled together, and the order of their concatenated rows."""

    shards: list[ShardEntry]
    order: NDArray[np.int64]


def shards_in_order(manifest: Manifest) -> list[ShardEntry]:
    """Return the shards of a dataset by view, then block."""
    return sorted(manifest.shards, key=lambda shard: (shard.view, shard.block))


def shards_by_view(manifest: Manifest) -> list[list[ShardEntry]]:
    """Return the shards of each view, in order of their blocks."""
    return [list(shards) for _, shards in groupby(shards_in_order(manifest), key=lambda shard: shard.view)]


def plan_epoch(
    manifest: Manifest,
    seed: int,
    epoch: int,
    *,
    all_views: bool = False,
    window: int | None = None,
    part: int = 0,
    parts: int = 1,
) -> list[Window]:
    """Return which shards an epoch reads, and in which order.

    An epoch has every image once: every block is read under one view, in a random order of all views, then in another
    one, so that V epochs see every view once. Blocks are shuffled, then rows within windows of blocks.

    Args:
        manifest: of the dataset.
        seed: of the order.
        epoch: counted from 0.
        all_views: an epoch has every view of every image instead, V times as many rows.
        window: shards whose rows are shuffled together; by default WINDOW_SHARDS.
        part, parts: which of several shares of the shards to read; each row is in one of them.
    """
    by_view = shards_by_view(manifest)
    views, blocks = len(by_view), len(by_view[0])
    generator = np.random.default_rng((seed, 2, epoch))
    if all_views:
        every = [shard for shards in by_view for shard in shards]
        chosen = [every[place] for place in generator.permutation(len(every))]
    else:
        cycle, turn = divmod(epoch, views)
        view_of = [np.random.default_rng((seed, 1, cycle, block)).permutation(views)[turn] for block in range(blocks)]
        chosen = [by_view[view_of[block]][block] for block in generator.permutation(blocks)]
    mine, window = chosen[part::parts], window or WINDOW_SHARDS
    windows = [mine[start : start + window] for start in range(0, len(mine), window)]
    return [Window(shards, generator.permutation(sum(shard.rows for shard in shards))) for shards in windows]
