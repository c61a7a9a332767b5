"""Samples that no search has led to a boundary, for comparison: random noise and the fast gradient sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.boundary import LogitsFunction, SearchResult, judged, logits_in_batches
from pipeline.newton import newton
from pipeline.projection import as_ray, per_row, row_sum
from pipeline.status import Status

ROUNDS = 8  # of stretching what clamping to [0, 1] has shortened


@torch.no_grad()
def one_step(
    logits_of: LogitsFunction,
    images: Tensor,
    base: Tensor,
    target: Tensor,
    *,
    direction: Literal["random", "fgsm"],
    draw: Sequence[int],
    tolerance: float = 0.02,
    max_gradients: int = 20,
    batch_size: int = 256,
    reference: LogitsFunction | None = None,
    logits: Tensor | None = None,
) -> SearchResult:
    """A step as long as the perturbation of `newton`, in another direction, so that only the direction differs.

    Pixels that are at 0 or 1 do not move out; the others make up for them, and the step has the same L2 norm in pixel
    space.

    Args:
        direction: 'random' for Gaussian noise, 'fgsm' for the sign of the gradient of the cross-entropy with the base
            class (Goodfellow et al., 2015).
        draw: what the noise follows from.

    Other arguments and errors are those of `pipeline.newton.newton`; the gradients are those of both.
    """
    reference = reference or logits_of
    found = newton(
        logits_of,
        images,
        base,
        target,
        tolerance=tolerance,
        max_gradients=max_gradients,
        batch_size=batch_size,
        reference=reference,
        logits=logits,
    )
    if direction == "random":
        noise = np.random.default_rng(draw).standard_normal(images.shape, np.float32)
        step = torch.from_numpy(noise).to(images.device)
    else:
        parts = zip(torch.split(images, batch_size), torch.split(base, batch_size), strict=True)
        step = torch.cat([_loss_gradient(reference, x, label).sign() for x, label in parts])
    moved = _of_length(images, step, found.distance)
    ray, scale = as_ray(moved, quantise=True)
    end_logits = logits_in_batches(reference, images + ray * per_row(scale), batch_size)
    gradients = found.gradients + (direction == "fgsm")
    stuck = (row_sum(moved.square()) == 0) & (found.status != Status.BASE_MISCLASSIFIED)
    status = torch.where(stuck, Status.BAD_GRADIENT, found.status)
    return judged(ray, scale, end_logits, base, target, tolerance, status, gradients, found.forwards + 1)


def _loss_gradient(logits_of: LogitsFunction, images: Tensor, labels: Tensor) -> Tensor:
    """(n, C, H, W) a positive multiple of the gradient of the cross-entropy.

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
    """(R, C, H, W) a step of the same signs that stays in [0, 1] and has a given L2 norm (R,), where there is room."""
    step = torch.where(((images <= 0) & (step < 0)) | ((images >= 1) & (step > 0)), 0, step)
    norm = row_sum(step.square()).sqrt()
    scale = torch.where(norm > 0, length / norm, 0)
    for _ in range(ROUNDS):
        norm = row_sum(((images + step * per_row(scale)).clamp(0, 1) - images).square()).sqrt()
        scale = torch.where(norm > 0, scale * length / norm, 0)
    return (images + step * per_row(scale)).clamp(0, 1) - images
