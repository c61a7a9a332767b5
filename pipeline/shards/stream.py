"""Streaming a sample dataset: rows in a seeded random order, by reading whole shards one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.shards.manifest import ShardEntry
from pipeline.shards.order import WINDOW_SHARDS, plan_epoch
from pipeline.shards.reader import BoundaryShards, with_samples

ROWS_AT_A_TIME = 64  # whose samples are put together at once


def _shared(value: int) -> Tensor:
    """Return a number that other processes see change."""
    number = torch.tensor(value)
    number.share_memory_()  # type: ignore[no-untyped-call]
    return number


class StreamedShards(IterableDataset[dict[str, Tensor]]):
    """Rows of a sample dataset as `BoundaryShards` gives them, in an order for training.

    An epoch has every image once, under one of its views, as in the pipeline's own training: schedules mean the same,
    and without workers the rows come in the same order. Shards are taken in a random order, and rows from a buffer of
    several shards, by (seed, epoch) alone. A shard is read in one piece for each column, which suits disks and URLs.
    The workers of a DataLoader, and the processes of a training run, share the shards out: each row comes once, and
    some shares are a shard larger than others.

    Args:
        directory: a path or URL, as for `BoundaryShards`.
        seed: of the order.
        all_views: an epoch has every view of every image, as many times as many rows.
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
        all_views: bool = False,
        buffer_shards: int = WINDOW_SHARDS,
        rank: int = 0,
        world_size: int = 1,
        verify: bool | None = None,
    ) -> None:
        self.shards = BoundaryShards(directory, verify)
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}")
        if buffer_shards < 1 or not 0 <= rank < world_size:
            given = f"{buffer_shards}, {rank} and {world_size}"
            raise ValueError(f"buffer_shards, rank, world_size: expected at least 1 and rank < world_size, got {given}")
        self.seed, self.all_views, self.buffer_shards = seed, all_views, buffer_shards
        self._epoch = _shared(0)  # workers that live on see it change
        self.rank, self.world_size = rank, world_size

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # a copy's own number is not shared yet

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; without it, every iteration is that of epoch 0."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        windows = plan_epoch(
            self.shards.manifest,
            self.seed,
            int(self._epoch),
            all_views=self.all_views,
            window=self.buffer_shards,
            part=self.rank * workers + number,
            parts=self.world_size * workers,
        )
        for shards, order in windows:
            columns = self._columns_of(shards)
            for start in range(0, len(order), ROWS_AT_A_TIME):
                rows = torch.from_numpy(order[start : start + ROWS_AT_A_TIME])
                some = with_samples({name: column[rows] for name, column in columns.items()})
                for row in range(len(rows)):
                    yield {name: column[row] for name, column in some.items()}

    def _columns_of(self, shards: Sequence[ShardEntry]) -> dict[str, Tensor]:
        """Return the stored columns of several shards; samples, four times as large, are made of a few rows."""
        names = self.shards.manifest.columns
        parts = [self.shards.read(shard, names) for shard in shards]
        return {name: torch.from_numpy(np.concatenate([part.pop(name) for part in parts])) for name in names}
