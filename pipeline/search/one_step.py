"""Samples that no search has led to a boundary, for comparison: random noise and the fast gradient sign."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.core.parameters import Search
from pipeline.core.status import Status
from pipeline.networks.classifier import Classifier
from pipeline.search.boundary import LogitsFunction, Problem, SearchResult, conclude
from pipeline.search.geometry import as_ray, per_row, row_sum
from pipeline.search.newton import NewtonSearch

ROUNDS = 8  # of stretching what clamping to [0, 1] has shortened


@dataclass(frozen=True, slots=True, kw_only=True)
class OneStepSearch:
    """Step as far as the default search goes, in another direction, so that only the direction differs.

    Pixels that are at 0 or 1 do not move out; the others make up for them, and the step has the same L2 norm in pixel
    space. Evaluations are those of the default search and of the step.
    """

    half_gradients: ClassVar[bool] = False
    draws: ClassVar[bool] = True

    direction: Literal["random", "fgsm"]
    """'random' for Gaussian noise, which follows from the problem's `draw`; 'fgsm' for the sign of the gradient of the
    cross-entropy with the base class (Goodfellow et al., 2015)."""
    max_gradients: int = 20
    """Of the default search, per row."""

    @classmethod
    def random(cls, given: Search, teacher: Classifier) -> OneStepSearch:
        """Make the step along noise."""
        return cls(direction="random", max_gradients=given.max_gradients)

    @classmethod
    def fgsm(cls, given: Search, teacher: Classifier) -> OneStepSearch:
        """Make the step along the sign of the gradient."""
        return cls(direction="fgsm", max_gradients=given.max_gradients)

    @torch.no_grad()
    def __call__(self, problem: Problem) -> SearchResult:
        images = problem.images
        found = NewtonSearch(max_gradients=self.max_gradients)(problem)
        moved = _of_length(images, self._step(problem), found.distance)
        delta, scale = as_ray(moved, problem.levels)
        stuck = (row_sum(moved.square()) == 0) & (found.status != Status.BASE_MISCLASSIFIED)
        status = torch.where(found.status == Status.CONVERGED, Status.NOT_CONVERGED, found.status)
        result = conclude(
            problem,
            delta=delta,
            delta_scale=scale,
            boundary_logits=problem.reference_logits(images + delta * per_row(scale)),
            status=torch.where(stuck, Status.BAD_GRADIENT, status).to(torch.uint8),
            evaluations=found.evaluations + (self.direction == "fgsm"),
            forwards=found.forwards + 1,
        )
        # A length is that of a sample only where the default search has found one.
        lost = (found.status == Status.NOT_CONVERGED) & ~stuck
        return replace(result, status=torch.where(lost, found.status, result.status))

    def _step(self, problem: Problem) -> Tensor:
        """Return a direction (R, C, H, W) of any length."""
        if self.direction == "random":
            noise = np.random.default_rng(problem.draw).standard_normal(problem.images.shape, np.float32)
            return torch.from_numpy(noise).to(problem.images.device)
        batches = (torch.split(each, problem.batch_size) for each in (problem.images, problem.base))
        parts = zip(*batches, strict=True)
        return torch.cat([_loss_gradient(problem.reference, x, label).sign() for x, label in parts])


def _loss_gradient(logits_of: LogitsFunction, images: Tensor, labels: Tensor) -> Tensor:
    """Return a positive multiple of the gradient (n, C, H, W) of the cross-entropy.

    Of a confident network, the cross-entropy's own gradient cancels in float32; that of the logarithm of the others'
    odds does not.
    """
    x = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(x)
        others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
        (gradient,) = torch.autograd.grad((others - logits.gather(1, labels[:, None]).squeeze(1)).sum(), x)
    return gradient


def _of_length(images: Tensor, step: Tensor, length: Tensor) -> Tensor:
    """Return a step (R, C, H, W) of the same signs, within [0, 1], of a given L2 norm (R,) where there is room."""
    step = torch.where(((images <= 0) & (step < 0)) | ((images >= 1) & (step > 0)), 0, step)
    norm = row_sum(step.square()).sqrt()
    scale = torch.where(norm > 0, length / norm, 0)
    for _ in range(ROUNDS):
        norm = row_sum(((images + step * per_row(scale)).clamp(0, 1) - images).square()).sqrt()
        scale = torch.where(norm > 0, scale * length / norm, 0)
    return (images + step * per_row(scale)).clamp(0, 1) - images
