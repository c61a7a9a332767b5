"""What all boundary searches share: from a base sample to the boundary with a target class.

A search takes a callable from pixels to logits and returns tensors; it knows no files, shards or datasets. Samples
are rows of one set: those that are finished leave the batch and waiting ones take their places, so the device runs
full batches. Losses are summed over rows, so the gradient of a row does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.projection import per_row, row_sum
from pipeline.status import Status

LogitsFunction = Callable[[Tensor], Tensor]


class SearchResult(NamedTuple):
    """What was found for R rows. The sample of row r is `images[r] + direction[r] * scale[r]`, never clipped."""

    direction: Tensor
    """(R, C, H, W) float32; whole numbers in [-127, 127] when the search quantises."""
    scale: Tensor
    """(R,) float32, at least 0."""
    logits: Tensor
    """(R, classes) float32 at the sample, from the reference network."""
    margin: Tensor
    """(R,) float32, logit of the base class minus logit of the target class, at the sample."""
    distance: Tensor
    """(R,) float32, L2 norm of the perturbation in pixel space."""
    status: Tensor
    """(R,) uint8, values of `Status`."""
    gradients: Tensor
    """(R,) int32, gradient evaluations."""
    forwards: Tensor
    """(R,) int32, forward passes without a gradient, the final judgement included."""
    target: Tensor
    """(R,) int64, the class on the other side: as asked for, or of an untargeted search the one that it came to."""

    @property
    def perturbation(self) -> Tensor:
        """(R, C, H, W) float32, sample minus image in pixel space."""
        return self.direction * per_row(self.scale)


def margin_of(logits: Tensor, base: Tensor, target: Tensor) -> Tensor:
    """(R,) logit margins z_b - z_k of logits (R, classes)."""
    return (logits.gather(1, base[:, None]) - logits.gather(1, target[:, None])).squeeze(1)


def probability_margin(margin: Tensor) -> Tensor:
    """tanh(|m| / 2): the difference of the probabilities of two classes alone, in [0, 1].

    Example:
        >>> probability_margin(torch.tensor([0.0, -2.0]))
        tensor([0.0000, 0.7616])
    """
    return (margin.abs() / 2).tanh()


def judge(logits: Tensor, base: Tensor, target: Tensor, tolerance: float) -> Tensor:
    """Status (R,) uint8 of samples from their logits alone: CONVERGED, NOT_CONVERGED or THIRD_CLASS.

    Converged means tanh(|m| / 2) <= tolerance with the base and target class above all others; a tie with a third
    class counts as third class on top.

    Example:
        >>> logits = torch.tensor([[1.0, 1.01, 0.0], [1.0, 3.0, 0.0], [1.0, 1.0, 2.0]])
        >>> base, target = torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1])
        >>> judge(logits, base, target, tolerance=0.02)  # converged, not on the boundary, a third class on top
        tensor([0, 2, 3], dtype=torch.uint8)
    """
    pair = torch.stack([base, target], 1)
    lower = logits.gather(1, pair).amin(1)
    others = logits.scatter(1, pair, -torch.inf).amax(1)
    status = torch.where(others < lower, Status.CONVERGED, Status.THIRD_CLASS)  # a NaN is a third class
    on_boundary = probability_margin(margin_of(logits, base, target)) <= tolerance  # False for NaN
    return torch.where(on_boundary, status, Status.NOT_CONVERGED).to(torch.uint8)


def logits_in_batches(logits_of: LogitsFunction, images: Tensor, batch_size: int) -> Tensor:
    """Logits (R, classes) of images (R, C, H, W), `batch_size` of them at a time."""
    return torch.cat([logits_of(batch) for batch in torch.split(images, batch_size)])


def margin_and_gradient(
    logits_of: LogitsFunction, x: Tensor, base: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (R, classes), margins (R,) and the margins' gradients (R, C, H, W) with respect to `x`."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(x)
        margin = margin_of(logits, base, target)
        (gradient,) = torch.autograd.grad(margin.sum(), x)
    return logits.detach(), margin.detach(), gradient


def check_arguments(images: Tensor, base: Tensor, target: Tensor) -> None:
    """Refuse arguments of a search that do not fit each other."""
    rows = len(images)
    if images.ndim != 4 or base.shape != (rows,) or target.shape != (rows,):
        raise ValueError(
            "expected images (R, C, H, W), base (R,) and target (R,), "
            f"got {tuple(images.shape)}, {tuple(base.shape)} and {tuple(target.shape)}"
        )
    if not bool(((images >= 0) & (images <= 1)).all()):  # False for NaN
        raise ValueError(f"images must be in [0, 1], got {images.amin():.3g} to {images.amax():.3g}")
    if bool((base == target).any()):
        raise ValueError(f"base and target class are the same in row {int((base == target).int().argmax())}")


def judged(
    direction: Tensor,
    scale: Tensor,
    logits: Tensor,
    base: Tensor,
    target: Tensor,
    tolerance: float,
    status: Tensor,
    gradients: Tensor,
    forwards: Tensor,
) -> SearchResult:
    """The result of a search, its samples judged by their logits except where the search ended for another reason."""
    return SearchResult(
        direction,
        scale,
        logits,
        margin_of(logits, base, target),
        row_sum((direction * per_row(scale)).square()).sqrt(),
        torch.where(status == Status.CONVERGED, judge(logits, base, target, tolerance), status),
        gradients,
        forwards,
        target,
    )
