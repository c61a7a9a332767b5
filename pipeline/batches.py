"""Batches for training, and their source for training without a teacher.

A source gives the batches of an epoch. What they contain and in which order follows from (seed, epoch) alone, so a
run that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data import Prepared
from pipeline.status import Status
from pipeline.views import Stream, apply_views, draw_views


class BoundaryBatch(NamedTuple):
    """Boundary-supporting samples of some rows of a batch."""

    samples: Tensor
    """(M, C, H, W) float32, pixel space."""
    teacher_logits: Tensor
    """(M, classes), at the samples."""
    usable: Tensor
    """(M,) bool."""


@dataclass(frozen=True)
class Batch:
    """One batch on the device of training."""

    images: Tensor
    """(N, C, H, W) float32 in [0, 1]."""
    labels: Tensor
    """(N,) int64."""
    teacher_logits: Tensor | None = None
    """(N, classes) float32, on the images."""
    usable: Tensor | None = None
    """(N,) bool, rows that may have a boundary-supporting sample."""
    boundary: Callable[[Tensor], BoundaryBatch] | None = None
    """Boundary-supporting samples of rows (M,)."""

    def part(self, number: int, parts: int) -> tuple[Batch, float]:
        """The share of one of several processes, and the factor by which its mean loss counts in the mean over all.

        A process without a row gets the first one, with factor 0.
        """
        if parts == 1:
            return self, 1.0
        total = len(self.labels)
        rows = torch.arange(total, device=self.labels.device)[number::parts]
        factor = len(rows) * parts / total
        rows = rows if len(rows) else torch.zeros(1, dtype=torch.int64, device=self.labels.device)
        boundary = self.boundary
        return Batch(
            self.images[rows],
            self.labels[rows],
            None if self.teacher_logits is None else self.teacher_logits[rows],
            None if self.usable is None else self.usable[rows],
            None if boundary is None else lambda chosen: boundary(rows[chosen]),
        ), factor


def is_any_of(status: Tensor, wanted: Iterable[Status]) -> Tensor:
    """Where values of the column `status` are among those wanted: a mask of the same shape."""
    return torch.stack([status == each for each in wanted]).any(0)


class Source(Protocol):
    """Where batches come from."""

    rows: int
    """Samples in an epoch."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, counted from 0."""


def batches_of(rows: int, batch_size: int) -> Iterator[slice]:
    """Which rows make a batch each. A last one of one row joins the one before: batch norm cannot train on it."""
    starts = list(range(0, rows, batch_size))
    if batch_size > 1 and len(starts) > 1 and rows - starts[-1] == 1:
        starts.pop()
    ends = [*starts[1:], rows] if starts else []
    for start, end in zip(starts, ends, strict=True):
        yield slice(start, end)


class FreshSource:
    """All training images, each under a fresh view in every epoch; no teacher needed."""

    def __init__(
        self, train: Prepared, padding: int, flip: bool, seed: int, batch_size: int, device: torch.device
    ) -> None:
        self.rows = len(train.labels)
        self.images = torch.from_numpy(train.images).to(device)
        self.labels = torch.from_numpy(train.labels).to(device)
        self.padding, self.flip, self.seed, self.batch_size, self.device = padding, flip, seed, batch_size, device

    def epoch(self, epoch: int) -> Iterator[Batch]:
        for _, batch in self.indexed(epoch):
            yield batch

    def indexed(self, epoch: int) -> Iterator[tuple[NDArray[np.int64], Batch]]:
        """Batches with their rows in the training split."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        drawn = draw_views(self.seed, epoch, 0, self.rows, self.padding, self.flip, Stream.FRESH_VIEWS)
        for batch in batches_of(self.rows, self.batch_size):
            index = order[batch]
            rows = torch.from_numpy(index).to(self.device)
            crop = torch.from_numpy(drawn.crop[index]).to(self.device)
            flip = torch.from_numpy(drawn.flip[index]).to(self.device)
            views = apply_views(self.images[rows], crop, flip, self.padding)
            yield index, Batch(views.float() / 255, self.labels[rows])
