"""Shares of an epoch: what each of several readers reads of it, and what is left where they were broken off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.shards.manifest import Manifest, ShardEntry
from pipeline.shards.order import Window, plan_epoch

Taken = tuple[int, int]
"""A share, by its number, and the rows that were taken of it."""
Run = Sequence[Taken | None]
"""How far the shares of an epoch are, in the order of their readers; None where it is not known."""
Left = list[tuple[ShardEntry, NDArray[np.int64]]]
"""Shards with their rows that nobody has read."""


class Epoch(NamedTuple):
    """What the order of an epoch follows from; arguments of `plan_epoch`."""

    manifest: Manifest
    seed: int
    epoch: int
    all_views: bool
    window: int

    def share(self, broken: Sequence[Run], part: int, parts: int) -> list[Window]:
        """Return one of several shares of what runs that were broken off, one after the other, have left."""
        return self._share(self._left(broken), len(broken), part, parts)

    def sizes(self, broken: Sequence[Run], parts: int) -> list[int]:
        """Return the rows of each of several shares of what runs have left."""
        left = self._left(broken)
        shares = [self._share(left, len(broken), part, parts) for part in range(parts)]
        return [sum(len(window.order) for window in share) for share in shares]

    def _share(self, left: Left | None, broken: int, part: int, parts: int) -> list[Window]:
        if left is None:
            return plan_epoch(
                self.manifest,
                self.seed,
                self.epoch,
                all_views=self.all_views,
                window=self.window,
                part=part,
                parts=parts,
            )
        mine, generator = left[part::parts], np.random.default_rng((self.seed, 4, self.epoch, broken, part))
        windows = []
        for start in range(0, len(mine), self.window):
            shards, rows = zip(*mine[start : start + self.window], strict=True)
            starts = np.cumsum([0, *(shard.rows for shard in shards[:-1])])
            places = np.concatenate([each + first for each, first in zip(rows, starts, strict=True)])
            windows.append(Window(list(shards), generator.permutation(places)))
        return windows

    def _left(self, broken: Sequence[Run]) -> Left | None:
        """Return what runs have left; None for the whole epoch."""
        left: Left | None = None
        for number, run in enumerate(broken):
            if None in run:
                raise ValueError(
                    f"the state is that of one of {len(run)} workers: go on with as many, each from its own state"
                )
            rest: Left = []
            for part, taken in sorted(each for each in run if each is not None):
                for window in self._share(left, number, part, len(run)):
                    rest += _rest(window, taken)
                    taken = max(0, taken - len(window.order))
            left = rest
        return left


def _rest(window: Window, taken: int) -> Left:
    """Return the shards of a window with the rows that are left when so many have been taken."""
    order, ends = window.order[taken:], np.cumsum([shard.rows for shard in window.shards])
    owner = np.searchsorted(ends, order, side="right")
    rows = [order[owner == number] - (ends[number] - shard.rows) for number, shard in enumerate(window.shards)]
    return [(shard, each) for shard, each in zip(window.shards, rows, strict=True) if len(each)]


def advanced(run: Run, sizes: Sequence[int], batches: int, batch_size: int, drop_last: bool) -> tuple[list[Taken], int]:
    """Return how far shares are after so many batches, in the order in which their readers go on; and all batches.

    The readers take turns, a batch each, as the workers of a DataLoader do; who has no more is left out.

    Args:
        run: how far the shares of the readers were.
        sizes: rows of each share, by its number.
        batches: that were given in all.
        batch_size: rows of a batch.
        drop_last: readers keep a last batch of fewer rows to themselves.
    """
    if None in run:
        raise ValueError("the state is that of one worker: a loader of torchdata counts for itself")
    shares = [each for each in run if each is not None]
    left = np.array([sizes[part] - taken for part, taken in shares])
    most = left // batch_size if drop_last else -(-left // batch_size)
    reader = np.repeat(np.arange(len(shares)), most)
    turn = np.concatenate([np.arange(count) for count in most])
    reader = reader[np.lexsort((reader, turn))]
    given = np.bincount(reader[:batches], minlength=len(shares))
    taken = np.minimum(given * batch_size, left).tolist()
    first = int(reader[batches]) if batches < len(reader) else 0
    after = [(part, before + more) for (part, before), more in zip(shares, taken, strict=True)]
    return [*after[first:], *after[:first]], len(reader)
