"""Streaming a sample dataset: rows in a seeded random order, by reading whole shards one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.shards.manifest import ShardEntry, manifest_digest
from pipeline.shards.order import WINDOW_SHARDS, Window
from pipeline.shards.reader import BoundaryShards, with_samples
from pipeline.shards.shares import Epoch, Run, Taken, advanced

ROWS_AT_A_TIME = 64  # whose samples are put together at once


class StreamedShards(IterableDataset[dict[str, Tensor]]):
    """Rows of a sample dataset as `BoundaryShards` gives them, in an order for training.

    An epoch has every image once, under one of its views, as in the pipeline's own training: schedules mean the same,
    and without workers the rows come in the same order. Shards are taken in a random order, and rows from a buffer of
    several shards, by (seed, epoch) alone. A shard is read in one piece for each column, which suits disks and URLs.
    The workers of a DataLoader, and the processes of a training run, share the shards out: each row comes once, and
    some shares are a shard larger than others. An epoch that was broken off goes on by `state_dict` and
    `load_state_dict`.

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
        self.rank, self.world_size = rank, world_size
        self._shared = torch.zeros(2, dtype=torch.int64)  # the epoch, and whether workers read it
        self._loaded: tuple[int, list[Run]] = (0, [])  # an epoch, and how far it was when it was broken off
        self._given = (0, 0)  # by the last iteration of this process: its epoch, and how many rows
        self.__setstate__({})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._shared.share_memory_()  # type: ignore[no-untyped-call]  # other processes see it change

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; without it, every iteration is that of epoch 0."""
        self._shared[0] = epoch

    def state_dict(self, loader: DataLoader[Any] | None = None, batches: int | None = None) -> dict[str, Any]:
        """Return how far this epoch is, in numbers, texts and lists.

        The workers of a DataLoader read ahead, so only its caller knows how many batches have come. The processes of a
        training run are taken to have had as many batches each, by loaders of the same kind: the state of one of them
        is that of all.

        Args:
            loader: that gives this stream's rows in batches; None where this process iterates over the stream, or
                over a loader without workers. A worker of torchdata's StatefulDataLoader gives none either: what it
                returns says how far this worker is, and is for one of as many workers.
            batches: how many it has given of this epoch since the epoch began or, after `load_state_dict`, went on.

        Raises:
            ValueError: workers read and there is no loader; there are fewer batches; or their order is not known.
        """
        worker, epoch = get_worker_info(), int(self._shared[0])
        if (loader is None) != (batches is None):
            raise ValueError("loader, batches: expected both, or neither where no workers read")
        if worker is None and loader is None and self._shared[1]:
            raise ValueError("loader, batches: expected both, since workers of a DataLoader read ahead")
        if not getattr(loader, "in_order", True):
            raise ValueError("loader: expected in_order=True: which rows have come is not known otherwise")
        given = self._given[1] if self._given[0] == epoch else 0
        if worker is not None:
            readers = self.world_size * worker.num_workers
            broken, run = self._so_far(readers)
            number = self.rank * worker.num_workers + worker.id
            after: list[Taken | None] = [None] * readers
            if (share := run[number]) is not None:
                after[number] = (share[0], share[1] + given)
        else:
            workers, size, drop_last = 1, 1, False
            if loader is not None:
                workers, size, drop_last = max(1, loader.num_workers), loader.batch_size or 1, loader.drop_last
            count = given if batches is None else batches
            broken, run = self._so_far(self.world_size * workers)
            sizes = self._order().sizes(broken, len(run))
            after = []
            for rank in range(self.world_size):
                mine = run[rank * workers : (rank + 1) * workers]
                there, most = advanced(mine, sizes, count, size, drop_last)
                if rank == self.rank and not 0 <= count <= most:
                    raise ValueError(f"batches: expected 0 to {most}, got {count}")
                after += there
        runs = [[list(each) if each else None for each in run] for run in (*broken, after)]
        return self._identity() | {"epoch": epoch, "runs": runs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with an epoch that was broken off: iterations of it give the rows that are left, each once.

        Other epochs are whole, so `set_epoch` is called as ever. By as many workers and processes as before, the rows
        come in the order in which they would have come; by another number, in another one. Call it before workers
        begin.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: the state is of another dataset, seed or kind of epoch.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(f"{name}: the state is of {state[name]}, this stream has {value}")
        runs: list[Run] = [[tuple(each) if each else None for each in run] for run in state["runs"]]
        self._loaded, self._given = (state["epoch"], runs), (0, 0)
        self.set_epoch(state["epoch"])

    def _identity(self) -> dict[str, Any]:
        """Return what a state must have in common with a stream that goes on from it."""
        digest = manifest_digest(self.shards.manifest)
        return {
            "dataset": digest,
            "seed": self.seed,
            "all_views": self.all_views,
            "buffer_shards": self.buffer_shards,
        }

    def _order(self) -> Epoch:
        return Epoch(self.shards.manifest, self.seed, int(self._shared[0]), self.all_views, self.buffer_shards)

    def _so_far(self, readers: int) -> tuple[list[Run], Run]:
        """Return the runs of this epoch that other numbers of readers broke off, and how far so many readers are."""
        epoch, runs = self._loaded
        if epoch != int(self._shared[0]):
            runs = []
        if runs and len(runs[-1]) == readers:
            return runs[:-1], runs[-1]
        return runs, [(part, 0) for part in range(readers)]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker, epoch = get_worker_info(), int(self._shared[0])
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        self._shared[1], self._given = int(worker is not None), (epoch, 0)
        readers = self.world_size * workers
        broken, run = self._so_far(readers)
        if (share := run[self.rank * workers + number]) is None:
            raise ValueError("the state is that of another worker: each goes on from its own")
        part, taken = share
        return self._rows(epoch, self._order().share(broken, part, readers), taken)

    def _rows(self, epoch: int, windows: Sequence[Window], taken: int) -> Iterator[dict[str, Tensor]]:
        """Yield the rows of windows but for the first ones, and count them."""
        given = 0
        for shards, order in windows:
            rest, taken = order[taken:], max(0, taken - len(order))
            columns = self._columns_of(shards) if len(rest) else {}
            for start in range(0, len(rest), ROWS_AT_A_TIME):
                rows = torch.from_numpy(rest[start : start + ROWS_AT_A_TIME])
                some = with_samples({name: column[rows] for name, column in columns.items()})
                for row in range(len(rows)):
                    given += 1
                    self._given = (epoch, given)
                    yield {name: column[row] for name, column in some.items()}

    def _columns_of(self, shards: Sequence[ShardEntry]) -> dict[str, Tensor]:
        """Return the stored columns of several shards; samples, four times as large, are made of a few rows."""
        names = self.shards.manifest.columns
        parts = [self.shards.read(shard, names) for shard in shards]
        return {name: torch.from_numpy(np.concatenate([part.pop(name) for part in parts])) for name in names}
