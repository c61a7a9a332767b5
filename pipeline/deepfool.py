"""DeepFool (Moosavi-Dezfooli et al., 2016), for comparison: the nearest boundary with any class."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.boundary import LogitsFunction, SearchResult, check_arguments, judged, logits_in_batches
from pipeline.projection import as_ray, per_row, row_sum
from pipeline.status import Status


@torch.no_grad()
def deepfool(
    logits_of: LogitsFunction,
    images: Tensor,
    base: Tensor,
    target: Tensor,
    *,
    tolerance: float = 0.02,
    batch_size: int = 64,
    steps: int = 50,
    overshoot: float = 0.02,
    classes: int = 10,
    reference: LogitsFunction | None = None,
) -> SearchResult:
    """Step to the nearest of the linearised boundaries until the top class is no longer the base class.

    The result is a little past the boundary, by the overshoot, so that not every sample counts as converged. Points are
    clamped to [0, 1] after each step.

    Args:
        target: (R,) not used: the class of the result is the best but the base class where the search ended.
        steps: most evaluations of the gradients.
        overshoot: relative, of the whole perturbation.
        classes: only so many of the best classes at the image are tried.

    Other arguments and errors are those of `pipeline.newton.newton`; the gradients of all classes count as one.
    """
    check_arguments(images, base, target)
    walked = torch.zeros_like(images)
    gradients = torch.zeros_like(base, dtype=torch.int32)
    status = torch.full_like(base, Status.CONVERGED, dtype=torch.uint8)
    active = torch.ones_like(base, dtype=torch.bool)
    start = logits_in_batches(logits_of, images, batch_size).scatter(1, base[:, None], -torch.inf)
    others = start.topk(min(classes, start.shape[1]) - 1, 1).indices  # the best classes but the base class
    while len(rows := active.nonzero().squeeze(1)[:batch_size]):
        x = (images[rows] + (1 + overshoot) * walked[rows]).clamp(0, 1).requires_grad_()
        with torch.enable_grad():
            logits = logits_of(x)
            gaps = logits.gather(1, others[rows]) - logits.gather(1, base[rows][:, None])
            slopes = [torch.autograd.grad(gaps[:, k].sum(), x, retain_graph=True)[0] for k in range(gaps.shape[1])]
        gaps, slope = gaps.detach(), torch.stack(slopes, 1)
        gradients[rows] += 1
        left = torch.isfinite(logits).all(1) & (logits.argmax(1) != base[rows])
        status[rows[left & (gradients[rows] == 1)]] = Status.BASE_MISCLASSIFIED
        squared = slope.square().flatten(2).sum(2)
        nearest = torch.where(squared > 0, gaps.abs() / squared.sqrt(), torch.inf).argmin(1)
        at = torch.arange(len(rows), device=base.device), nearest
        step = per_row(gaps[at].abs() / squared[at]) * slope[at]
        bad = ~left & ~(torch.isfinite(row_sum(step.square())))
        status[rows[bad]] = Status.BAD_GRADIENT
        moves = ~(left | bad)
        walked[rows[moves]] += step[moves]
        active[rows] = moves & (gradients[rows] < steps)
    ends = (images + (1 + overshoot) * walked).clamp(0, 1)
    direction, scale = as_ray(ends - images, quantise=True)
    logits = logits_in_batches(reference or logits_of, images + direction * per_row(scale), batch_size)
    reached = logits.scatter(1, base[:, None], -torch.inf).argmax(1)
    return judged(direction, scale, logits, base, reached, tolerance, status, gradients, torch.ones_like(gradients))
