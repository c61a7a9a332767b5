"""Batches with the teacher and its boundary search in the training loop: the reference for shards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.status import Status
from pipeline.images.views import Stream, uniforms
from pipeline.search.targets import draw_targets
from pipeline.search.teacher_search import TeacherSearch
from pipeline.training.batches import BoundaryBatch, BoundarySamples, FreshSource, TeacherBatch, batches_of, is_any_of


class OnlineSource:
    """Fresh views with the teacher and its boundary search in the loop: the paper's algorithm, for reference.

    Args:
        fresh: the views.
        search: of the teacher.
        statuses: how the searches of the samples that are used may have ended.
    """

    def __init__(self, fresh: FreshSource, search: TeacherSearch, statuses: tuple[Status, ...]) -> None:
        self.rows, self.fresh, self.search, self.statuses = fresh.rows, fresh, search, statuses

    @torch.no_grad()
    def epoch(self, epoch: int) -> Iterator[TeacherBatch]:
        classes = self.search.teacher.architecture.classes
        noise = uniforms(self.fresh.seed, Stream.FRESH_TARGETS, epoch, 0, self.rows, classes)
        drawn = self.fresh.drawn(self.fresh.seed, epoch)
        parts = batches_of(self.rows, self.fresh.batch_size)
        for step, (part, batch) in enumerate(zip(parts, self.fresh.batches(drawn), strict=True)):
            known = TeacherBatch(
                images=batch.images,
                labels=batch.labels,
                index=batch.index,
                teacher_logits=self.search.teacher(batch.images),
            )
            yield BoundaryBatch(
                images=known.images,
                labels=known.labels,
                index=known.index,
                teacher_logits=known.teacher_logits,
                usable=torch.ones_like(known.labels, dtype=torch.bool),
                boundary=_SearchedSamples(self, known, noise[drawn.order[part]], (self.fresh.seed, epoch, step)),
            )


class _SearchedSamples:
    """The boundary-supporting samples of the rows of a batch, searched when they are needed."""

    def __init__(
        self, source: OnlineSource, batch: TeacherBatch, noise: NDArray[np.float64], draw: tuple[int, ...]
    ) -> None:
        self.source, self.batch, self.noise, self.draw = source, batch, noise, draw

    @torch.no_grad()
    def samples_of(self, rows: Tensor) -> BoundarySamples:
        chosen = self.batch.take(rows)
        logits, labels = chosen.teacher_logits, chosen.labels
        noise = self.noise[rows.cpu().numpy()]
        target = torch.from_numpy(draw_targets(logits.cpu().numpy(), labels.cpu().numpy(), noise, 1)[:, 0])
        found = self.source.search.find(chosen.images, labels, target.to(labels.device), logits, self.draw)
        return BoundarySamples(
            samples=chosen.images + found.perturbation,
            teacher_logits=found.boundary_logits,
            usable=is_any_of(found.status, self.source.statuses),
        )
