"""Batches from published shards: resident on the device, or read ahead; the same batches either way."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.errors import ShardError
from pipeline.core.status import Status
from pipeline.images.pixels import pixels
from pipeline.images.prepared import Prepared
from pipeline.machine import processor
from pipeline.shards.manifest import ShardEntry
from pipeline.shards.order import Window, plan_epoch
from pipeline.shards.reader import VIEW_COLUMNS, BoundaryShards, check_train, samples_of, views_again
from pipeline.training.batches import BoundaryBatch, BoundarySamples, TeacherBatch, batches_of, is_any_of

RESIDENT_SHARE = 0.5  # of the free memory may be taken for shards


class ShardSource:
    """The views and boundary-supporting samples of published shards.

    All shards are kept on the device when they fit into its memory; otherwise they are read ahead, window by window.
    Batches are the same either way.

    Args:
        shards: the dataset.
        seed: of order and choice of views.
        batch_size: rows of a batch.
        device: where batches are needed.
        statuses: how the searches of the boundary-supporting samples that are used may have ended; none are read
            without any.
        features: give the teacher's penultimate features, which the shards have.
        index: say which images a batch has.
        train: the prepared training split, needed when the shards do not embed their images.
        resident: keep all shards on the device; by default, if they fit.
    """

    def __init__(
        self,
        shards: BoundaryShards,
        seed: int,
        batch_size: int,
        device: torch.device,
        statuses: tuple[Status, ...] = (),
        features: bool = False,
        index: bool = False,
        train: Prepared | None = None,
        resident: bool | None = None,
    ) -> None:
        self.shards, self.seed, self.batch_size, self.device = shards, seed, batch_size, device
        self.rows = shards.manifest.rows
        self.train, self.statuses = train, statuses
        self.columns = ["label", "teacher_logits"]
        stored = shards.manifest.columns
        views = ["index", *(name for name in VIEW_COLUMNS if name in stored)]
        self.columns += ["image"] if "image" in stored else views
        self.index = index
        if index and "image" in stored:
            self.columns.append("index")
        if features:
            self.columns.append("teacher_features")
        if statuses:
            self.columns += ["status", "delta", "delta_scale", "boundary_logits"]
        if "image" not in stored:
            self._check_train()
        if resident is None:
            resident = self._bytes() <= RESIDENT_SHARE * free_memory(device)
        self._starts: dict[str, int] = {}
        self._resident = self._load_all() if resident else None

    def for_fit(self, seed: int, statuses: tuple[Status, ...]) -> ShardSource:
        """Return the same shards, without loading them again, in the order of another seed.

        Args:
            seed: of order and choice of views.
            statuses: how the searches of the samples that are used may have ended; none where the shards were loaded
                without samples.
        """
        other = copy.copy(self)
        other.seed, other.statuses = seed, statuses
        return other

    @property
    def is_resident(self) -> bool:
        """All shards are on the device."""
        return self._resident is not None

    def resident_batch(self, rows: Tensor, noise: Tensor) -> TeacherBatch:
        """Return rows (..., N) of all that are resident as a batch, chosen among their samples by `noise`."""
        assert self._resident is not None
        return self._batch(self._resident, rows, noise)

    def epoch(self, epoch: int) -> Iterator[TeacherBatch]:
        noise = self.noise(epoch)
        rest: dict[str, Tensor] = {}
        waiting = torch.empty(0, dtype=torch.int64, device=self.device)
        for columns, rows, last in self._windows(epoch):
            if self._resident is None and rest:  # rows left over from the last window come first
                columns = {name: torch.cat([rest[name], columns[name]]) for name in columns}
                rows = rows + len(waiting)
                waiting = torch.arange(len(waiting), device=self.device)
            rows = torch.cat([waiting, rows])
            # At least one row waits for the next window: the last batch must not be a single row.
            end = len(rows) if last else (len(rows) - 1) // self.batch_size * self.batch_size
            for batch in batches_of(end, self.batch_size):
                count = batch.stop - batch.start
                yield self._batch(columns, rows[batch], noise[:count])
                noise = noise[count:]
            waiting = rows[end:]
            if self._resident is None:
                rest = {name: column[waiting] for name, column in columns.items()}

    def _windows(self, epoch: int) -> Iterator[tuple[dict[str, Tensor], Tensor, bool]]:
        """Yield columns of each window, on the device, the order of the rows to take from them, and if it is the last.

        What is resident is one window: the order of an epoch goes to the device at once.
        """
        if self._resident is not None:
            yield self._resident, torch.from_numpy(self.order(epoch)).to(self.device), True
            return
        windows = plan_epoch(self.shards.manifest, self.seed, epoch)
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, windows[0].shards)
            for number, window in enumerate(windows):
                columns = ahead.result()
                if number + 1 < len(windows):
                    ahead = reader.submit(self._read, windows[number + 1].shards)
                on_device = {name: column.to(self.device, non_blocking=True) for name, column in columns.items()}
                yield on_device, torch.from_numpy(window.order).to(self.device), number == len(windows) - 1

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the rows of an epoch among all that are resident, in its order."""
        windows = plan_epoch(self.shards.manifest, self.seed, epoch)
        return np.concatenate([self._places(window) for window in windows])

    def _places(self, window: Window) -> NDArray[np.int64]:
        """Return the rows of a window among all that are resident, in its order."""
        return np.concatenate([np.arange(each.rows) + self._starts[each.name] for each in window.shards])[window.order]

    def noise(self, epoch: int) -> Tensor:
        """Return random numbers (rows, targets) of an epoch, by which one of several usable samples is taken.

        With one target class there is nothing to choose, and the numbers are not drawn.
        """
        shape = (self.rows, self.shards.manifest.targets)
        if not self.statuses or shape[1] == 1:
            return torch.zeros(shape, device=self.device)
        drawn = np.random.default_rng((self.seed, 3, epoch)).random(shape, np.float32)
        return torch.from_numpy(drawn).to(self.device)

    def _batch(self, columns: dict[str, Tensor], rows: Tensor, noise: Tensor) -> TeacherBatch:
        known: dict[str, Any] = {
            "images": pixels(columns["image"][rows]),
            "labels": columns["label"][rows],
            "index": columns["index"][rows] if self.index else None,
            "teacher_logits": columns["teacher_logits"][rows].float(),
            "teacher_features": columns["teacher_features"][rows].float() if "teacher_features" in columns else None,
        }
        if not self.statuses:
            return TeacherBatch(**known)
        usable = is_any_of(columns["status"][rows], self.statuses)
        # With several targets, one of the usable ones is taken, at random.
        choice = torch.where(usable, noise, -1.0).argmax(-1)
        return BoundaryBatch(
            **known,
            usable=usable.any(-1),
            boundary=_StoredSamples(columns, rows, usable.any(-1), choice),
        )

    def _read(self, shards: list[ShardEntry]) -> dict[str, Tensor]:
        parts = [self.shards.read(shard, self.columns) for shard in shards]
        columns = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in self.columns}
        if self.train is not None and "image" not in columns:
            index = columns["index"]
            if len(index) and int(index.max()) >= len(self.train.labels):
                raise ShardError(f"{self.shards.directory}: column 'index' names images that the training data lacks")
            images = torch.from_numpy(self.train.images)[index]
            columns["image"] = views_again(images, columns, self.shards.manifest)
            for name in (*VIEW_COLUMNS, *([] if self.index else ["index"])):
                columns.pop(name, None)
        return columns

    def _load_all(self) -> dict[str, Tensor]:
        columns: dict[str, Tensor] = {}
        start = 0
        for shard in self.shards.manifest.shards:
            self._starts[shard.name] = start
            for name, values in self._read([shard]).items():
                if name not in columns:
                    shape = (self.shards.manifest.totals.rows, *values.shape[1:])
                    columns[name] = torch.empty(shape, dtype=values.dtype, device=self.device)
                columns[name][start : start + shard.rows] = values
            start += shard.rows
        return columns

    def _bytes(self) -> int:
        manifest = self.shards.manifest
        columns = {name: manifest.columns[name] for name in self.columns}
        row = sum(np.dtype(c.dtype).itemsize * int(np.prod(c.shape, dtype=np.int64)) for c in columns.values())
        return manifest.totals.rows * (row + int(np.prod(manifest.image_shape)))

    def _check_train(self) -> None:
        check_train(self.shards.directory, self.shards.manifest, self.train)


class StackedShardSource:
    """The same shards, resident, in the orders of several seeds: the batches of a stack.

    Args:
        shards: loaded, and resident.
        seeds: of order and choice of views of each member.
    """

    def __init__(self, shards: ShardSource, seeds: Sequence[int]) -> None:
        self.rows, self.shards = shards.rows, shards
        self.members = [shards.for_fit(seed, shards.statuses) for seed in seeds]

    def epoch(self, epoch: int) -> Iterator[TeacherBatch]:
        orders = np.stack([member.order(epoch) for member in self.members])
        order = torch.from_numpy(orders).to(self.shards.device)
        noise = torch.stack([member.noise(epoch) for member in self.members])
        for batch in batches_of(self.rows, self.shards.batch_size):
            yield self.shards.resident_batch(order[:, batch], noise[:, batch])


class _StoredSamples:
    """The boundary-supporting samples of the rows of a batch, put together from columns when they are needed."""

    def __init__(self, columns: dict[str, Tensor], rows: Tensor, usable: Tensor, choice: Tensor) -> None:
        self.columns, self.rows, self.usable, self.choice = columns, rows, usable, choice

    def samples_of(self, rows: Tensor) -> BoundarySamples:
        columns = self.columns
        at, usable = (self.rows.gather(-1, rows), self.choice.gather(-1, rows)), self.usable.gather(-1, rows)
        # Fillers go through the network too: with their image and its logits, which are finite.
        scale = torch.where(usable, columns["delta_scale"][at], 0)
        logits = torch.where(usable[..., None], columns["boundary_logits"][at], columns["teacher_logits"][at[0]])
        samples = samples_of(columns["image"][at[0]], columns["delta"][at], scale)
        return BoundarySamples(samples=samples, teacher_logits=logits, usable=usable)


def free_memory(device: torch.device) -> int:
    """Return bytes that are free on a device, or that this process may take of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return processor.free_memory()
