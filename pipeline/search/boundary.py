"""What all boundary searches share: the problem, the result, and how samples are judged.

A search takes pixels and callables from pixels to logits, and returns tensors; it knows no files, shards or datasets.
Samples are rows of one set: those that are finished leave the batch and waiting ones take their places, so the device
runs full batches. Losses are summed over rows, so the gradient of a row does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from pipeline.core.status import Status
from pipeline.search.geometry import MOST_LEVELS, per_row, row_sum

TOLERANCE = 0.02  # where nobody asks for another one
LogitsFunction = Callable[[Tensor], Tensor]
"""From pixels (n, C, H, W) in [0, 1] to logits (n, classes)."""
OtherViews = Callable[[Literal["same", "any"]], Tensor]
"""Another view (R, C, H, W) in [0, 1] for each row: of the same image, or of any one, drawn at random."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """R images, for each of which a sample on the boundary between two classes is sought.

    Raises:
        ValueError: the arguments do not fit each other.
    """

    images: Tensor
    """(R, C, H, W) float32 in [0, 1]."""
    base: Tensor
    """(R,) int64, the classes that the reference predicts for the images."""
    target: Tensor
    """(R,) int64, other classes."""
    logits: Tensor
    """(R, classes) of the reference at the images."""
    reference: LogitsFunction
    """The network that decides where the boundary is, and whose logits are recorded."""
    fast: LogitsFunction
    """The network of which gradients are taken; it may be faster and less precise than the reference."""
    tolerance: float = TOLERANCE
    """The largest probability margin tanh(|m| / 2) of a converged sample."""
    batch_size: int = 256
    """Rows of a pass."""
    levels: int | None = MOST_LEVELS
    """Largest magnitude of a direction, whose values are whole numbers; None: directions are not rounded."""
    draw: Sequence[int] = ()
    """What random noise follows from, in a search that takes any."""
    other_views: OtherViews | None = None
    """What samples that are put together from views take."""

    def __post_init__(self) -> None:
        rows = len(self.images)
        if self.images.ndim != 4 or self.base.shape != (rows,) or self.target.shape != (rows,):
            raise ValueError(
                "expected images (R, C, H, W), base (R,) and target (R,), "
                f"got {tuple(self.images.shape)}, {tuple(self.base.shape)} and {tuple(self.target.shape)}"
            )
        check_images(self.images)
        same = self.base == self.target
        if bool(same.any()):
            raise ValueError(f"base and target class are the same in row {int(same.int().argmax())}")

    def reference_logits(self, images: Tensor) -> Tensor:
        """Return the reference's logits (n, classes) of images (n, C, H, W), a batch at a time."""
        return logits_in_batches(self.reference, images, self.batch_size)


def check_images(images: Tensor) -> None:
    """Refuse what are no images (R, C, H, W) of floating point in [0, 1]."""
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"expected images (R, C, H, W) of floating point, got {images.dtype} {tuple(images.shape)}")
    if not bool(((images >= 0) & (images <= 1)).all()):  # False for NaN
        raise ValueError(
            f"images must be in [0, 1], got {images.amin():.9g} to {images.amax():.9g}: divide bytes by 255, undo a "
            "normalisation (the model owns it), clamp what rounding brought outside"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What was found for R rows. The sample of row r is `images[r] + delta[r] * delta_scale[r]`, never clipped."""

    delta: Tensor
    """(R, C, H, W) float32; whole numbers from -levels to levels, where directions are rounded."""
    delta_scale: Tensor
    """(R,) float32, at least 0."""
    boundary_logits: Tensor
    """(R, classes) float32 at the sample, from the reference network."""
    margin: Tensor
    """(R,) float32, logit of the base class minus logit of the target class, at the sample."""
    distance: Tensor
    """(R,) float32, L2 norm of the perturbation in pixel space."""
    status: Tensor
    """(R,) uint8, values of `Status`."""
    evaluations: Tensor
    """(R,) int32, gradient evaluations."""
    forwards: Tensor
    """(R,) int32, forward passes without a gradient, the final judgement included."""
    target: Tensor
    """(R,) int64, the class on the other side. An untargeted search says which one it came to."""

    @property
    def perturbation(self) -> Tensor:
        """(R, C, H, W) float32, sample minus image in pixel space."""
        return self.delta * per_row(self.delta_scale)


class BoundarySearch(Protocol):
    """A search: hyperparameters in the constructor, a problem in the call."""

    half_gradients: ClassVar[bool]
    """Whether gradients in bfloat16 serve it."""
    draws: ClassVar[bool]
    """Whether a result depends on random numbers or other views of the rows of one problem."""

    def __call__(self, problem: Problem) -> SearchResult:
        """Search a sample for each row."""


def margin_of(logits: Tensor, base: Tensor, target: Tensor) -> Tensor:
    """Return the logit margins z_b - z_k (R,) of logits (R, classes)."""
    return (logits.gather(1, base[:, None]) - logits.gather(1, target[:, None])).squeeze(1)


def probability_margin(margin: Tensor) -> Tensor:
    """Return tanh(|m| / 2): the difference of the probabilities of two classes alone, in [0, 1].

    Example:
        >>> probability_margin(torch.tensor([0.0, -2.0]))
        tensor([0.0000, 0.7616])
    """
    return (margin.abs() / 2).tanh()


def judge(logits: Tensor, base: Tensor, target: Tensor, tolerance: float) -> Tensor:
    """Return the status (R,) uint8 of samples from their logits alone: CONVERGED, NOT_CONVERGED or THIRD_CLASS.

    Converged means tanh(|m| / 2) <= tolerance with the base and target class above all others. A tie with a third
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


def conclude(
    problem: Problem,
    *,
    delta: Tensor,
    delta_scale: Tensor,
    boundary_logits: Tensor,
    status: Tensor,
    evaluations: Tensor,
    forwards: Tensor,
    target: Tensor | None = None,
) -> SearchResult:
    """Return the result of a search, its samples judged by their logits.

    Rows whose status is not NOT_CONVERGED ended for another reason, and keep it. `target` is that of the problem if
    the search has not come to another one. For the rest see `SearchResult`.
    """
    target = problem.target if target is None else target
    judged = judge(boundary_logits, problem.base, target, problem.tolerance)
    return SearchResult(
        delta=delta,
        delta_scale=delta_scale,
        boundary_logits=boundary_logits,
        margin=margin_of(boundary_logits, problem.base, target),
        distance=row_sum((delta * per_row(delta_scale)).square()).sqrt(),
        status=torch.where(status == Status.NOT_CONVERGED, judged, status),
        evaluations=evaluations,
        forwards=forwards,
        target=target,
    )


def logits_in_batches(logits_of: LogitsFunction, images: Tensor, batch_size: int) -> Tensor:
    """Return the logits (R, classes) of images (R, C, H, W), `batch_size` of them at a time."""
    return torch.cat([logits_of(batch) for batch in torch.split(images, batch_size)])


def margin_and_gradient(
    logits_of: LogitsFunction, x: Tensor, base: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (R, classes), margins (R,) and the margins' gradients (R, C, H, W) with respect to `x`."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(x)
        margin = margin_of(logits, base, target)
        (gradient,) = torch.autograd.grad(margin.sum(), x)
    return logits.detach(), margin.detach(), gradient
