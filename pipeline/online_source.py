"""Batches with the teacher and its boundary search in the training loop: the reference for shards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.attack import Search, draw_targets
from pipeline.batches import Batch, BoundaryBatch, FreshSource, is_any_of
from pipeline.status import Status
from pipeline.views import Stream, uniforms


class OnlineSource:
    """Fresh views with the teacher and its boundary search in the loop: the paper's algorithm, for reference."""

    def __init__(self, fresh: FreshSource, search: Search, statuses: tuple[Status, ...]) -> None:
        self.rows, self.fresh, self.search, self.statuses = fresh.rows, fresh, search, statuses

    @torch.no_grad()
    def epoch(self, epoch: int) -> Iterator[Batch]:
        classes = self.search.teacher.architecture.classes
        noise = uniforms(self.fresh.seed, Stream.FRESH_TARGETS, epoch, 0, self.rows, classes)
        for step, (index, batch) in enumerate(self.fresh.indexed(epoch)):
            logits = self.search.teacher(batch.images)
            draw = (self.fresh.seed, epoch, step)

            def boundary(
                rows: Tensor,
                batch: Batch = batch,
                logits: Tensor = logits,
                noise: NDArray[np.float64] = noise[index],
                draw: tuple[int, ...] = draw,
            ) -> BoundaryBatch:
                labels = batch.labels[rows]
                at = rows.cpu().numpy()
                target = draw_targets(logits[rows].cpu().numpy(), labels.cpu().numpy(), noise[at], 1)[:, 0]
                images = batch.images[rows]
                found = self.search.find(images, labels, torch.from_numpy(target).to(labels.device), logits[rows], draw)
                usable = is_any_of(found.status, self.statuses)
                return BoundaryBatch(images + found.perturbation, found.logits, usable)

            usable = torch.ones_like(batch.labels, dtype=torch.bool)
            yield Batch(batch.images, batch.labels, logits, usable, boundary)
