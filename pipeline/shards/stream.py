"""Streaming a sample dataset: rows in a seeded random order, by reading whole shards one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.shards.reader import BoundaryShards


def _shared(value: int) -> Tensor:
    """A number that other processes see change."""
    number = torch.tensor(value)
    number.share_memory_()  # type: ignore[no-untyped-call]
    return number


class StreamedShards(IterableDataset[dict[str, Tensor]]):
    """Rows of a sample dataset as `BoundaryShards` gives them, in an order for training.

    Shards are taken in a random order, and rows from a buffer of several shards, by (seed, epoch) alone. Every shard is
    read once an epoch, in one piece for each column, which suits disks and URLs. The workers of a DataLoader, and the
    processes of a training run, share the shards out: each row comes once, and some shares are a shard larger than
    others.

    Args:
        directory: a path or URL, as for `BoundaryShards`.
        seed: of the order.
        views: the views to read; by default all.
        buffer_shards: shards whose rows are shuffled together, and held in memory.
        rank, world_size: of this process among those that share an epoch.
        verify: as for `BoundaryShards`.

    Raises:
        ShardError: as `BoundaryShards`.
        ValueError: an argument is out of range.

    Example: for row in DataLoader(StreamedShards("https://host/bss"), batch_size=256, num_workers=2): ...
    """

    def __init__(
        self,
        directory: Path | str,
        seed: int = 0,
        views: Sequence[int] | None = None,
        buffer_shards: int = 4,
        rank: int = 0,
        world_size: int = 1,
        verify: bool | None = None,
    ) -> None:
        self.shards = BoundaryShards(directory, verify)
        known = range(self.shards.manifest.views)
        self.views = list(known if views is None else views)
        if not self.views or not set(self.views) <= set(known) or len(set(self.views)) < len(self.views):
            raise ValueError(f"views: expected some of 0 to {known[-1]}, each once, got {self.views}")
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}")
        if buffer_shards < 1 or not 0 <= rank < world_size:
            given = f"{buffer_shards}, {rank} and {world_size}"
            raise ValueError(f"buffer_shards, rank, world_size: expected at least 1 and rank < world_size, got {given}")
        self.seed, self.buffer_shards = seed, buffer_shards
        self._epoch = _shared(0)  # workers that live on see it change
        self.rank, self.world_size = rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """The order of the next iteration; without it, every iteration is that of epoch 0."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker, epoch = get_worker_info(), int(self._epoch)
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        part, parts = self.rank * workers + number, self.world_size * workers
        shards = [shard for view in self.views for shard in self.shards.shards_of_view(view)]
        order = np.random.default_rng((self.seed, epoch)).permutation(len(shards))
        mine = [shards[place] for place in order[part::parts]]
        generator = np.random.default_rng((self.seed, epoch, part))
        for start in range(0, len(mine), self.buffer_shards):
            window = [self.shards.rows_of(shard) for shard in mine[start : start + self.buffer_shards]]
            columns = {name: torch.cat([rows[name] for rows in window]) for name in window[0]}
            for row in generator.permutation(len(columns["label"])).tolist():
                yield {name: column[row] for name, column in columns.items()}
