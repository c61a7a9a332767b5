"""Batches for training, and their source for training without a teacher.

A source gives the batches of an epoch. What they contain and in which order follows from (seed, epoch) alone, so a
run that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.parameters import Views
from pipeline.core.status import Status
from pipeline.images.pixels import pixels
from pipeline.images.prepared import Prepared
from pipeline.images.views import Stream, apply_views, draw_views, on_device


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundarySamples:
    """Boundary-supporting samples of M rows of a batch."""

    samples: Tensor
    """(..., M, C, H, W) float32, pixel space."""
    teacher_logits: Tensor
    """(..., M, classes), at the samples."""
    usable: Tensor
    """(..., M) bool; the others are fillers, to be left out of a loss."""


class BoundaryRows(Protocol):
    """Where the boundary-supporting samples of a batch come from: they are searched, or put together, when needed."""

    def samples_of(self, rows: Tensor) -> BoundarySamples:
        """Return the samples of rows (..., M) of the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """N images with their labels, on the device of training; for each of S students, if it is of a stack."""

    images: Tensor
    """(N, C, H, W) float32 in [0, 1]; (S, N, C, H, W) of a stack, and so on."""
    labels: Tensor
    """(N,) int64."""
    index: Tensor | None = None
    """(N,) int64, rows of the training split; None of a source that does not know."""

    @property
    def of_images(self) -> Tensor:
        """Return `index` of a source that knows."""
        if self.index is None:
            raise TypeError("the source of this method does not say which images a batch has")
        return self.index

    def take(self, rows: Tensor) -> Self:
        """Return some rows (M,) as a batch."""
        index = None if self.index is None else self.index[rows]
        return replace(self, images=self.images[rows], labels=self.labels[rows], index=index)

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
    teacher_features: Tensor | None = None
    """(N, D) float32, penultimate ones on the images, of a source that was asked for them."""

    def take(self, rows: Tensor) -> Self:
        features = None if self.teacher_features is None else self.teacher_features[rows]
        taken = Batch.take(self, rows)
        return replace(taken, teacher_logits=self.teacher_logits[rows], teacher_features=features)


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


class Drawn(NamedTuple):
    """What is drawn of an epoch of fresh views, in its order; of a stack, each has a dimension in front."""

    order: NDArray[np.int64]
    """(rows,) of the training split."""
    crop: NDArray[np.int16]
    """(rows, 2 or 4)."""
    flip: NDArray[np.uint8]
    """(rows,)."""
    colour: NDArray[np.int16]
    """(rows, 0 or 3)."""


class FreshSource:
    """All training images, each under a fresh view in every epoch; no teacher needed."""

    def __init__(self, train: Prepared, views: Views, seed: int, batch_size: int, device: torch.device) -> None:
        self.rows = len(train.labels)
        self.images = torch.from_numpy(train.images).to(device)
        self.labels = torch.from_numpy(train.labels).to(device)
        self.size = train.view_shape[1:]
        self.views, self.seed, self.batch_size, self.device = views, seed, batch_size, device

    def epoch(self, epoch: int) -> Iterator[Batch]:
        return self.batches(self.drawn(self.seed, epoch))

    def drawn(self, seed: int, epoch: int) -> Drawn:
        """Draw an epoch with any seed."""
        order = np.random.default_rng((seed, epoch)).permutation(self.rows)
        views = draw_views(seed, epoch, 0, self.rows, self.views, self.images.shape[2:], self.size, Stream.FRESH_VIEWS)
        return Drawn(order, views.crop[order], views.flip[order], views.colour[order])

    def batches(self, drawn: Drawn) -> Iterator[Batch]:
        """Yield the batches of an epoch."""
        # Once an epoch: the host would wait for each copy to a GPU.
        order, crop, flip, colour = (on_device(each, self.device) for each in drawn)
        for batch in batches_of(self.rows, self.batch_size):
            rows = order[..., batch]
            drawn_of = (
                crop[..., batch, :].flatten(0, -2),
                flip[..., batch].flatten(),
                colour[..., batch, :].flatten(0, -2),
            )
            views = apply_views(self.images[rows.flatten()], *drawn_of, self.views.padding, self.size)
            images = pixels(views).view(*rows.shape, *views.shape[1:])
            yield Batch(images=images, labels=self.labels[rows], index=rows)


class StackedFreshSource:
    """The same images under the views of several seeds: the batches of a stack."""

    def __init__(self, fresh: FreshSource, seeds: Sequence[int]) -> None:
        self.rows, self.fresh, self.seeds = fresh.rows, fresh, seeds

    def epoch(self, epoch: int) -> Iterator[Batch]:
        drawn = [self.fresh.drawn(seed, epoch) for seed in self.seeds]
        return self.fresh.batches(Drawn(*(np.stack(each) for each in zip(*drawn, strict=True))))
