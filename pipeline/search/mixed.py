"""Samples put together from views, for comparison: one more labelled input that costs no search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.core.parameters import Search
from pipeline.core.status import Status
from pipeline.networks.classifier import Classifier
from pipeline.search.boundary import Problem, SearchResult, conclude
from pipeline.search.geometry import as_ray, per_row


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedSamples:
    """Take another view of the image, or mix in a view of an image drawn at random; shares follow from `draw`."""

    half_gradients: ClassVar[bool] = False
    draws: ClassVar[bool] = True

    kind: Literal["view", "mixup", "cutmix"]
    """'view' for another view of the same image; 'mixup' for the mean of both images, with a share uniform in [0, 1)
    (Zhang et al., 2018); 'cutmix' for a box of the other image, whose share of the area is so before it is cut off at
    the borders (Yun et al., 2019)."""

    @classmethod
    def view(cls, given: Search, teacher: Classifier) -> MixedSamples:
        """Take another view."""
        return cls(kind="view")

    @classmethod
    def mixup(cls, given: Search, teacher: Classifier) -> MixedSamples:
        """Mix pixels."""
        return cls(kind="mixup")

    @classmethod
    def cutmix(cls, given: Search, teacher: Classifier) -> MixedSamples:
        """Paste a box."""
        return cls(kind="cutmix")

    @torch.no_grad()
    def __call__(self, problem: Problem) -> SearchResult:
        images = problem.images
        delta, scale = as_ray(self._mixed(problem) - images, problem.levels)
        none = torch.zeros_like(problem.base, dtype=torch.int32)
        return conclude(
            problem,
            delta=delta,
            delta_scale=scale,
            boundary_logits=problem.reference_logits(images + delta * per_row(scale)),
            status=torch.full_like(problem.base, Status.NOT_CONVERGED, dtype=torch.uint8),
            evaluations=none,
            forwards=none + 1,
        )

    def _mixed(self, problem: Problem) -> Tensor:
        """Return the samples (R, C, H, W)."""
        if problem.other_views is None:
            raise ValueError(f"'{self.kind}' needs other views, which this caller does not give")
        if self.kind == "view":
            return problem.other_views("same")
        numbers = np.random.default_rng(problem.draw).random((len(problem.images), 3), np.float32)
        share, top, left = torch.from_numpy(numbers).to(problem.images.device).unbind(1)
        other = problem.other_views("any")
        if self.kind == "mixup":
            return torch.lerp(problem.images, other, per_row(share))
        height, width = problem.images.shape[2:]
        inside = _within(top, share, height)[:, :, None] & _within(left, share, width)[:, None, :]
        return torch.where(inside[:, None], other, problem.images)


def _within(centre: Tensor, share: Tensor, pixels: int) -> Tensor:
    """Return (R, pixels): which pixels lie within sqrt(share) / 2 of a centre (R,), in fractions of the side."""
    places = (torch.arange(pixels, device=centre.device) + 0.5) / pixels
    return (places - centre[:, None]).abs() < share.sqrt()[:, None] / 2
