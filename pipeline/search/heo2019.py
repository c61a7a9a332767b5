"""The boundary search of Heo et al. (2019), for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.core.parameters import Search
from pipeline.core.status import Status
from pipeline.networks.classifier import Classifier
from pipeline.search.boundary import Problem, SearchResult, conclude, margin_and_gradient
from pipeline.search.geometry import as_ray, per_row, row_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Heo2019Search:
    """Follow the iterative rule of Heo et al. (2019) as in their released code.

    In normalised space, x <- clamp(x - step_size (L + epsilon) grad L / ||grad L||) with L = score_b - score_k, until
    the top class is no longer the base class, at most `steps` times. The results lie beyond the boundary, so
    few of them count as converged.
    """

    half_gradients: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    mean: Tensor
    """(C, 1, 1), of the normalisation of the network."""
    std: Tensor
    """(C, 1, 1), of the normalisation of the network."""
    probabilities: bool = False
    """Scores are softmax outputs instead of logits."""
    steps: int = 10
    """Most evaluations of the gradient."""
    step_size: float = 0.3
    """eta, per unit of L, in normalised units."""
    epsilon: float = 1e-4
    """Added to L."""
    bound: float = 2.5
    """Normalised pixels are clamped to [-bound, bound]."""

    @classmethod
    def on_logits(cls, given: Search, teacher: Classifier) -> Heo2019Search:
        """Make the search as the authors' code has it."""
        return cls(mean=teacher.mean, std=teacher.std)

    @classmethod
    def on_probabilities(cls, given: Search, teacher: Classifier) -> Heo2019Search:
        """Make the search as the paper has it."""
        return cls(mean=teacher.mean, std=teacher.std, probabilities=True)

    @torch.no_grad()
    def __call__(self, problem: Problem) -> SearchResult:
        images, base, target = problem.images, problem.base, problem.target
        start = (images - self.mean) / self.std
        x = start.clone()
        evaluations = torch.zeros_like(base, dtype=torch.int32)
        status = torch.full_like(base, Status.NOT_CONVERGED, dtype=torch.uint8)
        active = torch.ones_like(base, dtype=torch.bool)

        def scores_of(normalised: Tensor) -> Tensor:
            logits = problem.fast(normalised * self.std + self.mean)
            return logits.softmax(1) if self.probabilities else logits

        while len(rows := active.nonzero().squeeze(1)[: problem.batch_size]):
            scores, loss, gradient = margin_and_gradient(scores_of, x[rows], base[rows], target[rows])
            evaluations[rows] += 1
            norm = row_sum(gradient.square()).sqrt()
            finite = torch.isfinite(loss) & torch.isfinite(norm)
            left = finite & (scores.argmax(1) != base[rows])
            bad = ~left & ~(finite & (norm > 0))
            lost = left & (evaluations[rows] == 1)
            ended = torch.where(lost, Status.BASE_MISCLASSIFIED, status[rows])
            status[rows] = torch.where(bad, Status.BAD_GRADIENT, ended)
            moves = ~(left | bad)
            step = per_row(self.step_size * (loss + self.epsilon) / norm) * gradient
            x[rows] = torch.where(per_row(moves), (x[rows] - step).clamp(-self.bound, self.bound), x[rows])
            active[rows] = moves & (evaluations[rows] < self.steps)
        delta, scale = as_ray((x - start) * self.std, problem.levels)
        return conclude(
            problem,
            delta=delta,
            delta_scale=scale,
            boundary_logits=problem.reference_logits(images + delta * per_row(scale)),
            status=status,
            evaluations=evaluations,
            forwards=torch.ones_like(evaluations),
        )
