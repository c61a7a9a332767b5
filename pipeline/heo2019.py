"""The boundary search of Heo et al. (2019), for comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.boundary import (
    LogitsFunction,
    SearchResult,
    check_arguments,
    judged,
    logits_in_batches,
    margin_and_gradient,
)
from pipeline.projection import as_ray, per_row, row_sum
from pipeline.status import Status


@torch.no_grad()
def heo2019(
    logits_of: LogitsFunction,
    images: Tensor,
    base: Tensor,
    target: Tensor,
    *,
    mean: Tensor,
    std: Tensor,
    tolerance: float = 0.02,
    batch_size: int = 64,
    steps: int = 10,
    step_size: float = 0.3,
    epsilon: float = 1e-4,
    bound: float = 2.5,
    probabilities: bool = False,
    reference: LogitsFunction | None = None,
) -> SearchResult:
    """The iterative rule of Heo et al. (2019) as in their released code, for comparison.

    In normalised space, x <- clamp(x - step_size (L + epsilon) grad L / ||grad L||) with L = score_b - score_k, until
    the top class is no longer the base class, at most `steps` times. The results lie beyond the boundary, so
    few of them count as converged.

    Args:
        mean, std: (C, 1, 1), the normalisation of the network.
        steps: most evaluations of the gradient.
        step_size: eta, per unit of L, in normalised units.
        epsilon: added to L.
        bound: normalised pixels are clamped to [-bound, bound].
        probabilities: scores are softmax outputs instead of logits.

    Other arguments and errors are those of `pipeline.newton.newton`.
    """
    check_arguments(images, base, target)

    def scores_of(normalised: Tensor) -> Tensor:
        logits = logits_of(normalised * std + mean)
        return logits.softmax(1) if probabilities else logits

    start = (images - mean) / std
    x = start.clone()
    gradients = torch.zeros_like(base, dtype=torch.int32)
    status = torch.full_like(base, Status.CONVERGED, dtype=torch.uint8)
    active = torch.ones_like(base, dtype=torch.bool)
    while len(rows := active.nonzero().squeeze(1)[:batch_size]):
        scores, loss, gradient = margin_and_gradient(scores_of, x[rows], base[rows], target[rows])
        gradients[rows] += 1
        norm = row_sum(gradient.square()).sqrt()
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        left = finite & (scores.argmax(1) != base[rows])
        bad = ~left & ~(finite & (norm > 0))
        status[rows[bad]] = Status.BAD_GRADIENT
        status[rows[left & (gradients[rows] == 1)]] = Status.BASE_MISCLASSIFIED
        moves = ~(left | bad)
        step = per_row(step_size * (loss + epsilon) / norm) * gradient
        x[rows[moves]] = (x[rows] - step)[moves].clamp(-bound, bound)
        active[rows] = moves & (gradients[rows] < steps)
    direction, scale = as_ray((x - start) * std, quantise=True)
    logits = logits_in_batches(reference or logits_of, images + direction * per_row(scale), batch_size)
    return judged(direction, scale, logits, base, target, tolerance, status, gradients, torch.ones_like(gradients))
