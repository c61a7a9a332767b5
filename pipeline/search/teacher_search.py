"""The boundary search of one teacher: its networks, where they compute, and how a batch is searched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.networks.classifier import Classifier
from pipeline.networks.fast import folded, frozen, halved
from pipeline.search.boundary import BoundarySearch, OtherViews, Problem, SearchResult, logits_in_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSearch:
    """A search with the networks that it asks, on one device."""

    teacher: Classifier
    """The reference, frozen for evaluation."""
    fast: Classifier
    """A faster copy, from which gradients come."""
    search: BoundarySearch
    tolerance: float
    levels: int
    batch_size: int

    @classmethod
    def of(
        cls,
        teacher: Classifier,
        make: Callable[[Classifier], BoundarySearch],
        tolerance: float,
        levels: int,
        batch_size: int,
        device: torch.device,
    ) -> TeacherSearch:
        """Prepare a search on a device.

        Args:
            teacher: the reference network, whose logits are recorded; a copy of it is used.
            make: makes the search from the copy, which is on the device.
            tolerance: the largest probability margin of a converged sample.
            levels: largest magnitude of a direction.
            batch_size: samples per pass.
            device: where to search.
        """
        reference = frozen(teacher, device)
        search = make(reference)
        # What is recorded comes from the network itself. Searches for comparison get their gradients in float32.
        fast = folded(reference)
        return cls(
            teacher=reference,
            fast=halved(fast) if search.half_gradients else fast,
            search=search,
            tolerance=tolerance,
            levels=levels,
            batch_size=batch_size,
        )

    @property
    def device(self) -> torch.device:
        return self.teacher.mean.device

    def logits(self, images: Tensor) -> Tensor:
        """Return the teacher's logits (R, classes) of images (R, C, H, W) in [0, 1]."""
        return logits_in_batches(self.teacher, images, self.batch_size)

    def find(
        self,
        images: Tensor,
        base: Tensor,
        target: Tensor,
        logits: Tensor,
        draw: Sequence[int] = (),
        other_views: OtherViews | None = None,
    ) -> SearchResult:
        """Search samples; arguments are those of `Problem`, `logits` the teacher's."""
        return self.search(
            Problem(
                images=images,
                base=base,
                target=target,
                logits=logits,
                reference=self.teacher,
                fast=self.fast,
                tolerance=self.tolerance,
                levels=self.levels,
                batch_size=self.batch_size,
                draw=draw,
                other_views=other_views,
            )
        )
