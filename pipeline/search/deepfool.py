"""DeepFool (Moosavi-Dezfooli et al., 2016), for comparison: the nearest boundary with any class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from pipeline.core.parameters import Search
from pipeline.core.status import Status
from pipeline.networks.classifier import Classifier
from pipeline.search.boundary import Problem, SearchResult, conclude, logits_in_batches
from pipeline.search.geometry import as_ray, per_row, row_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepFoolSearch:
    """Step to the nearest of the linearised boundaries until the top class is no longer the base class.

    It is untargeted: the target class of the result is the best but the base class where the search ended. The result
    is a little past the boundary, by the overshoot, so that not every sample counts as converged. Points are clamped
    to [0, 1] after each step. The gradients of all classes count as one evaluation.
    """

    half_gradients: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    steps: int = 50
    """Most evaluations of the gradients."""
    overshoot: float = 0.02
    """Relative, of the whole perturbation."""
    classes: int = 10
    """Only so many of the best classes at the image are tried."""

    @classmethod
    def of(cls, given: Search, teacher: Classifier) -> DeepFoolSearch:
        """Make the search as the paper has it."""
        return cls()

    @torch.no_grad()
    def __call__(self, problem: Problem) -> SearchResult:
        images, base, logits_of = problem.images, problem.base, problem.fast
        walked = torch.zeros_like(images)
        evaluations = torch.zeros_like(base, dtype=torch.int32)
        status = torch.full_like(base, Status.NOT_CONVERGED, dtype=torch.uint8)
        active = torch.ones_like(base, dtype=torch.bool)
        start = logits_in_batches(logits_of, images, problem.batch_size).scatter(1, base[:, None], -torch.inf)
        others = start.topk(min(self.classes, start.shape[1]) - 1, 1).indices  # the best classes but the base class
        while len(rows := active.nonzero().squeeze(1)[: problem.batch_size]):
            x = (images[rows] + (1 + self.overshoot) * walked[rows]).clamp(0, 1).requires_grad_()
            with torch.enable_grad():
                logits = logits_of(x)
                gaps = logits.gather(1, others[rows]) - logits.gather(1, base[rows][:, None])
                slopes = [torch.autograd.grad(gaps[:, k].sum(), x, retain_graph=True)[0] for k in range(gaps.shape[1])]
            gaps, slope = gaps.detach(), torch.stack(slopes, 1)
            evaluations[rows] += 1
            left = torch.isfinite(logits).all(1) & (logits.argmax(1) != base[rows])
            lost = left & (evaluations[rows] == 1)
            squared = slope.square().flatten(2).sum(2)
            nearest = torch.where(squared > 0, gaps.abs() / squared.sqrt(), torch.inf).argmin(1)
            at = torch.arange(len(rows), device=base.device), nearest
            step = per_row(gaps[at].abs() / squared[at]) * slope[at]
            bad = ~left & ~(torch.isfinite(row_sum(step.square())))
            ended = torch.where(lost, Status.BASE_MISCLASSIFIED, status[rows])
            status[rows] = torch.where(bad, Status.BAD_GRADIENT, ended)
            moves = ~(left | bad)
            walked[rows] += torch.where(per_row(moves), step, 0)
            active[rows] = moves & (evaluations[rows] < self.steps)
        ends = (images + (1 + self.overshoot) * walked).clamp(0, 1)
        delta, scale = as_ray(ends - images, problem.levels)
        logits = problem.reference_logits(images + delta * per_row(scale))
        reached = logits.scatter(1, base[:, None], -torch.inf).argmax(1)
        return conclude(
            problem,
            delta=delta,
            delta_scale=scale,
            boundary_logits=logits,
            status=status,
            evaluations=evaluations,
            forwards=torch.ones_like(evaluations),
            target=reached,
        )
