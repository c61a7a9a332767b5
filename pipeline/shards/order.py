"""The order in which the rows of shards are read in an epoch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.shards.manifest import ShardEntry
from pipeline.shards.reader import BoundaryShards

WINDOW_SHARDS = 16  # rows are shuffled within so many shards, so that streaming needs no more memory


class Window(NamedTuple):
    """Shards whose rows are shuffled together, and the order of their concatenated rows."""

    shards: list[ShardEntry]
    order: NDArray[np.int64]


def plan_epoch(shards: BoundaryShards, seed: int, epoch: int) -> list[Window]:
    """Which shards an epoch reads, and in which order.

    Every block is read under one view an epoch, in a random order of all views, then in another one: V epochs see every
    view once. Blocks are shuffled, then rows within windows of blocks.
    """
    views = shards.manifest.views
    blocks = len(shards.shards_of_view(0))
    cycle, turn = divmod(epoch, views)
    view_of = [int(np.random.default_rng((seed, 1, cycle, block)).permutation(views)[turn]) for block in range(blocks)]
    generator = np.random.default_rng((seed, 2, epoch))
    order = generator.permutation(blocks)
    chosen = [shards.shards_of_view(view_of[block])[block] for block in order]
    windows = [chosen[start : start + WINDOW_SHARDS] for start in range(0, blocks, WINDOW_SHARDS)]
    return [Window(window, generator.permutation(sum(shard.rows for shard in window))) for window in windows]
