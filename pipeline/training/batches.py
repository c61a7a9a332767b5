"""Batches for training, and their source for training without a teacher.

A source gives the batches of an epoch. What they contain and in which order follows from (seed, epoch) alone, so a
run that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.parameters import Views
from pipeline.core.status import Status
from pipeline.images.pixels import pixels
from pipeline.images.prepared import Prepared
from pipeline.images.views import Stream, apply_views, draw_views


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundarySamples:
    """Boundary-supporting samples of M rows of a batch."""

    samples: Tensor
    """(M, C, H, W) float32, pixel space."""
    teacher_logits: Tensor
    """(M, classes), at the samples."""
    usable: Tensor
    """(M,) bool; the others are fillers, to be left out of a loss."""


class BoundaryRows(Protocol):
    """Where the boundary-supporting samples of a batch come from: they are searched, or put together, when needed."""

    def samples_of(self, rows: Tensor) -> BoundarySamples:
        """Return the samples of rows (M,) of the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """N images with their labels, on the device of training."""

    images: Tensor
    """(N, C, H, W) float32 in [0, 1]."""
    labels: Tensor
    """(N,) int64."""

    def take(self, rows: Tensor) -> Self:
        """Return some rows (M,) as a batch."""
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def part(self, number: int, parts: int) -> tuple[Self, float]:
        """Return the share of one of several processes, and the factor by which its mean loss counts in that of all.

        A process without a row gets the first one, with factor 0.
        """
        if parts == 1:
            return self, 1.0
        total = len(self.labels)
        rows = torch.arange(total, device=self.labels.device)[number::parts]
        factor = len(rows) * parts / total
        return self.take(rows if len(rows) else rows.new_zeros(1)), factor


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherBatch(Batch):
    """A batch of which the teacher's logits are known."""

    teacher_logits: Tensor
    """(N, classes) float32, on the images."""

    def take(self, rows: Tensor) -> Self:
        return replace(Batch.take(self, rows), teacher_logits=self.teacher_logits[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryBatch(TeacherBatch):
    """A batch that has boundary-supporting samples."""

    usable: Tensor
    """(N,) bool, rows that may have a sample."""
    boundary: BoundaryRows

    def take(self, rows: Tensor) -> Self:
        taken = TeacherBatch.take(self, rows)
        return replace(taken, usable=self.usable[rows], boundary=_SomeRows(self.boundary, rows))


class _SomeRows:
    """The samples of some rows of a batch."""

    def __init__(self, boundary: BoundaryRows, rows: Tensor) -> None:
        self.boundary, self.rows = boundary, rows

    def samples_of(self, rows: Tensor) -> BoundarySamples:
        return self.boundary.samples_of(self.rows[rows])


def is_any_of(status: Tensor, wanted: Iterable[Status]) -> Tensor:
    """Return a mask, of the same shape, of where values of the column `status` are among those wanted."""
    return torch.stack([status == each for each in wanted]).any(0)


class Source(Protocol):
    """Where batches come from."""

    rows: int
    """Samples in an epoch."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Return the batches of an epoch, counted from 0."""


def batches_of(rows: int, batch_size: int) -> Iterator[slice]:
    """Yield which rows make a batch each. A single last row joins the batch before: batch norm cannot train on it."""
    starts = list(range(0, rows, batch_size))
    if batch_size > 1 and len(starts) > 1 and rows - starts[-1] == 1:
        starts.pop()
    ends = [*starts[1:], rows] if starts else []
    for start, end in zip(starts, ends, strict=True):
        yield slice(start, end)


class FreshSource:
    """All training images, each under a fresh view in every epoch; no teacher needed."""

    def __init__(self, train: Prepared, views: Views, seed: int, batch_size: int, device: torch.device) -> None:
        self.rows = len(train.labels)
        self.images = torch.from_numpy(train.images).to(device)
        self.labels = torch.from_numpy(train.labels).to(device)
        self.views, self.seed, self.batch_size, self.device = views, seed, batch_size, device

    def epoch(self, epoch: int) -> Iterator[Batch]:
        for _, batch in self.indexed(epoch):
            yield batch

    def indexed(self, epoch: int) -> Iterator[tuple[NDArray[np.int64], Batch]]:
        """Yield batches with their rows in the training split."""
        index = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        padding = self.views.padding
        drawn = draw_views(self.seed, epoch, 0, self.rows, padding, self.views.flip, Stream.FRESH_VIEWS)
        # Once an epoch: the host would wait for each copy to a GPU.
        order, crop, flip = (torch.from_numpy(each).to(self.device) for each in (index, drawn.crop, drawn.flip))
        for batch in batches_of(self.rows, self.batch_size):
            rows = order[batch]
            views = apply_views(self.images[rows], crop[rows], flip[rows], padding)
            yield index[batch], Batch(images=pixels(views), labels=self.labels[rows])
