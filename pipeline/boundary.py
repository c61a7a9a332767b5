"""The search for boundary-supporting samples: from a base sample to the boundary with a target class.

A search takes a callable from pixels to logits and returns tensors; it knows no files, shards or datasets. Samples
are rows of one set: those that are finished leave the batch and waiting ones take their places, so the device runs
full batches. Losses are summed over rows, so the gradient of a row does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.status import Status

LogitsFunction = Callable[[Tensor], Tensor]

INT8_MAX = 127
PROJECTION_STEPS = 6  # each frees the search of the pixels that saturated in the last one; more change nothing
OVERSHOOT = 0.1  # relative: aim past the boundary, so that the end of a ray brackets it
OVERSHOOT_LOGITS = 0.01
NEAR = 0.3  # of the first margin: from here the linearised boundary is trusted for the whole way from the image
MAX_PROBES = 12  # forward passes on one ray
MAX_OPEN_PROBES = 2  # the same while all of them fell short of the boundary
CLEARANCE = 0.5  # logits by which a third class is to fall below the pair
AIM = 0.8  # of the tolerance, where the search stops: the rest is for rounding in the final judgement


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

    @property
    def perturbation(self) -> Tensor:
        """(R, C, H, W) float32, sample minus image in pixel space."""
        return self.direction * per_row(self.scale)


def per_row(values: Tensor) -> Tensor:
    """(R,) as (R, 1, 1, 1), to scale images row by row."""
    return values[:, None, None, None]


def row_sum(images: Tensor) -> Tensor:
    """(R, C, H, W) summed to (R,)."""
    return images.sum((1, 2, 3))


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
    """
    pair = torch.stack([base, target], 1)
    lower = logits.gather(1, pair).amin(1)
    others = logits.scatter(1, pair, -torch.inf).amax(1)
    status = torch.where(others >= lower, Status.THIRD_CLASS, Status.CONVERGED)
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


def project(origin: Tensor, gradient: Tensor, decrease: Tensor) -> Tensor:
    """The point of the box [0, 1]^d nearest to `origin` at which a linear margin has fallen by `decrease`.

    It is clip(origin - l * gradient, 0, 1) for the l at which the fall is as asked. The fall is concave and piecewise
    linear in l, so Newton's method from l = decrease / ||gradient||^2 approaches it from below, one step for each
    round of newly saturated pixels. Where the box allows no such fall, the corner that comes nearest is returned.

    Args:
        origin: (R, C, H, W) in [0, 1].
        gradient: (R, C, H, W) of the margin, not all zero in any row.
        decrease: (R,) of the margin, above 0.
    """
    length = decrease / row_sum(gradient.square())
    for _ in range(PROJECTION_STEPS):
        unclipped = origin - per_row(length) * gradient
        point = unclipped.clamp(0, 1)
        fall = row_sum(gradient * (origin - point))
        slope = row_sum(gradient.square() * (unclipped == point))
        length = length + torch.where(slope > 0, (decrease - fall) / slope, 0)
    return (origin - per_row(length) * gradient).clamp(0, 1)


def project_on_two(
    origin: Tensor, first: Tensor, second: Tensor, first_decrease: Tensor, second_decrease: Tensor
) -> Tensor:
    """A point of the box [0, 1]^d near `origin` at which two linear functions have fallen as asked.

    The least-norm step on both, repeated over the pixels that it does not push out of range.

    Args:
        origin: (R, C, H, W) in [0, 1].
        first, second: (R, C, H, W), gradients.
        first_decrease, second_decrease: (R,).
    """
    gradients = torch.stack([first, second], 1).flatten(2)  # (R, 2, d)
    decrease = torch.stack([first_decrease, second_decrease], 1)
    start = origin.flatten(1)
    point, free = start, torch.ones_like(start)
    for _ in range(PROJECTION_STEPS):
        usable = gradients * free[:, None]
        done = torch.einsum("rid,rd->ri", gradients, (start - point) * (1 - free))
        gram = usable @ usable.transpose(1, 2)
        gram = gram + 1e-6 * gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] * torch.eye(2, device=gram.device)
        lengths = torch.linalg.solve_ex(gram, decrease - done)[0].nan_to_num(0, 0, 0)
        unclipped = torch.where(free > 0, start - torch.einsum("ri,rid->rd", lengths, gradients), point)
        point = unclipped.clamp(0, 1)
        free = free * (unclipped == point)
    return point.view_as(origin)


def as_ray(perturbation: Tensor, quantise: bool) -> tuple[Tensor, Tensor]:
    """Split perturbations into a direction and the scale at which the direction reaches them.

    Returns:
        direction (R, C, H, W): largest magnitude 127, rounded to whole numbers, or 1 when not quantised; and
        scale (R,), 0 for a perturbation of zero.
    """
    levels = INT8_MAX if quantise else 1
    scale = perturbation.abs().amax((1, 2, 3)) / levels
    direction = perturbation / per_row(torch.where(scale > 0, scale, 1))
    return direction.round() if quantise else direction, scale


class _NewtonSearch:
    """The state of `newton` over R rows. A row walks (needs a gradient), closes (needs a forward pass) or is done."""

    WALKING, SIDESTEPPING, CLOSING, DONE = range(4)

    def __init__(
        self, images: Tensor, base: Tensor, target: Tensor, aim: float, max_gradients: int, quantise: bool
    ) -> None:
        self.images, self.base, self.target = images, base, target
        self.aim, self.max_gradients, self.quantise = aim, max_gradients, quantise
        zeros = images.new_zeros(len(images))
        counts = zeros.int()
        self.phase = torch.full_like(counts, self.WALKING)
        self.status = torch.full_like(counts, Status.CONVERGED, dtype=torch.uint8)  # unless something else ends the row
        self.gradients, self.forwards, self.probes = counts.clone(), counts.clone(), counts.clone()
        self.point = images.clone()  # where the next gradient is taken
        self.start_margin = zeros.clone()
        self.closed_once = zeros.bool()
        # The ray from the image on which the root of the margin is searched, as a function of the scale.
        self.direction, self.scale, self.slope = torch.zeros_like(images), zeros.clone(), zeros.clone()
        self.inside, self.outside = zeros.clone(), torch.full_like(zeros, torch.inf)
        self.last_scale, self.last_margin = zeros.clone(), zeros.clone()

    def rows_in(self, phase: int) -> Tensor:
        return (self.phase == phase).nonzero().squeeze(1)

    def walk(self, rows: Tensor, logits_of: LogitsFunction) -> None:
        """Take one gradient at each row's point, and lay a ray to where the linearised margin is zero."""
        _, margin, gradient = margin_and_gradient(logits_of, self.point[rows], self.base[rows], self.target[rows])
        self.gradients[rows] += 1
        first = self.gradients[rows] == 1
        norm = row_sum(gradient.square())
        bad = ~(torch.isfinite(margin) & torch.isfinite(norm) & (norm > 0))
        no_base = first & (margin <= 0) & ~bad
        self.status[rows[bad]] = Status.BAD_GRADIENT
        self.status[rows[no_base]] = Status.BASE_MISCLASSIFIED
        self.phase[rows[bad | no_base]] = self.DONE
        good = ~(bad | no_base)
        rows, margin, gradient, first = rows[good], margin[good], gradient[good], first[good]
        self.start_margin[rows] = torch.where(first, margin, self.start_margin[rows])

        # Near the boundary, the nearest point of the linearised boundary is sought from the image, not from the
        # current point: that sheds the detours of the steps before. Once such a ray fell short, only go on.
        images, point = self.images[rows], self.point[rows]
        near = (margin <= NEAR * self.start_margin[rows]) & ~self.closed_once[rows]
        from_image = margin + row_sum(gradient * (images - point))
        restart = (first | near) & (from_image > 0)
        decrease = torch.where(restart, from_image, margin.clamp(min=0))
        origin = torch.where(per_row(restart), images, point)
        end = project(origin, gradient, decrease * (1 + OVERSHOOT) + OVERSHOOT_LOGITS)

        self._lay_ray(rows, end, gradient, from_image, restart)
        last = self.gradients[rows] >= self.max_gradients
        closing = (near & ~first) | self.closed_once[rows] | last
        self.closed_once[rows] |= closing
        self.phase[rows] = torch.where(closing, self.CLOSING, self.WALKING).int()

    def sidestep(self, rows: Tensor, logits_of: LogitsFunction) -> None:
        """Where a third class is on top of a sample on the boundary, move along the boundary until it is not.

        A Newton step on two linearised constraints: the margin stays zero, and the third class falls below the pair.
        """
        images, x = self.images[rows], self.point[rows].requires_grad_()
        pair = torch.stack([self.base[rows], self.target[rows]], 1)
        with torch.enable_grad():
            logits = logits_of(x)
            margin = margin_of(logits, self.base[rows], self.target[rows])
            others = logits.scatter(1, pair, -torch.inf)
            excess = others.amax(1) - logits.gather(1, pair).mean(1)
            (gradient,) = torch.autograd.grad(margin.sum(), x, retain_graph=True)
            (excess_gradient,) = torch.autograd.grad(excess.sum(), x)
        x, margin, excess = x.detach(), margin.detach(), excess.detach()
        self.gradients[rows] += 2
        end = project_on_two(
            x, gradient, excess_gradient, margin + OVERSHOOT_LOGITS, excess * (1 + OVERSHOOT) + CLEARANCE
        )
        from_image = margin + row_sum(gradient * (images - x))
        self._lay_ray(rows, end, gradient, from_image, torch.ones_like(rows, dtype=torch.bool))
        self.phase[rows] = self.CLOSING

    def _lay_ray(self, rows: Tensor, end: Tensor, gradient: Tensor, from_image: Tensor, restart: Tensor) -> None:
        """Search next on the ray from each image through `end`; first where the linearised margin is zero on it."""
        direction, full = as_ray(end - self.images[rows], self.quantise)
        slope = row_sum(gradient * direction)
        expected = -from_image / slope
        self.point[rows], self.direction[rows], self.slope[rows] = end, direction, slope
        self.scale[rows] = torch.where(restart & (expected > 0) & (expected < full), expected, full)
        self.inside[rows], self.outside[rows], self.probes[rows] = 0, torch.inf, 0

    def close(self, rows: Tensor, logits_of: LogitsFunction) -> None:
        """Evaluate the margin at each row's scale, and take a secant step that stays inside the bracket."""
        images, direction, scale = self.images[rows], self.direction[rows], self.scale[rows]
        logits = logits_of(images + direction * per_row(scale))
        margin = margin_of(logits, self.base[rows], self.target[rows])
        self.forwards[rows] += 1
        self.probes[rows] += 1
        probes = self.probes[rows]
        secant = (margin - self.last_margin[rows]) / (scale - self.last_scale[rows])
        slope = torch.where((probes > 1) & torch.isfinite(secant) & (secant < 0), secant, self.slope[rows])
        inside = torch.where(margin > 0, scale, self.inside[rows])
        outside = torch.where(margin <= 0, scale, self.outside[rows])
        bracketed = torch.isfinite(outside)
        limit = self._largest_scale(images, direction)

        step = scale - margin / slope
        otherwise = torch.where(bracketed, (inside + outside) / 2, 1.5 * scale)
        sound = (step > inside) & (step < outside) & (step < 1.5 * scale)
        step = torch.minimum(torch.where(sound, step, otherwise), limit)

        found = probability_margin(margin) <= self.aim
        short = ~found & ~bracketed & ((scale >= limit) | (probes >= MAX_OPEN_PROBES))
        over = found | (probes >= MAX_PROBES) | (short & (self.gradients[rows] >= self.max_gradients))
        third = found & (judge(logits, self.base[rows], self.target[rows], 1.0) == Status.THIRD_CLASS)
        aside = third & (self.gradients[rows] + 2 <= self.max_gradients)
        moved = short | aside
        self.point[rows[moved]] = (images + direction * per_row(scale))[moved].clamp(0, 1)
        self.scale[rows] = torch.where(found | short, scale, step)
        self.slope[rows], self.last_margin[rows], self.last_scale[rows] = slope, margin, scale
        self.inside[rows], self.outside[rows] = inside, outside
        self.phase[rows] = torch.where(over, self.DONE, torch.where(short, self.WALKING, self.CLOSING)).int()
        self.phase[rows[aside]] = self.SIDESTEPPING

    def _largest_scale(self, images: Tensor, direction: Tensor) -> Tensor:
        """The scale up to which the ray stays within half a quantisation step of the box."""
        slack = 0.5 if self.quantise else 0.0
        room = torch.where(direction > 0, 1 - images, images) / (direction.abs() - slack)
        return torch.where(direction.abs() > slack, room, torch.inf).amin((1, 2, 3))


@torch.no_grad()
def newton(
    logits_of: LogitsFunction,
    images: Tensor,
    base: Tensor,
    target: Tensor,
    *,
    tolerance: float = 0.02,
    max_gradients: int = 20,
    batch_size: int = 256,
    quantise: bool = True,
    reference: LogitsFunction | None = None,
) -> SearchResult:
    """Find samples on the boundary between base and target class, near their images (default search).

    Newton steps on the logit margin lead to the boundary. There the nearest point of the linearised boundary is taken
    from the image, exactly within the box [0, 1]; the ray from the image through it is rounded to int8, and the root
    of the margin on that rounded ray is closed in on by forward passes alone. So what is stored is what was searched.

    Args:
        logits_of: pixels (n, C, H, W) in [0, 1] to logits (n, classes); differentiable.
        images: (R, C, H, W) float32 in [0, 1].
        base: (R,) int64, classes that `logits_of` predicts for the images.
        target: (R,) int64, other classes.
        tolerance: largest probability margin tanh(|m| / 2) of a converged sample.
        max_gradients: gradient evaluations per row.
        batch_size: rows per pass.
        quantise: round directions to int8; otherwise they stay float32.
        reference: network whose logits are recorded and judged; by default `logits_of`.

    Raises:
        ValueError: the arguments do not fit each other.
    """
    _check(images, base, target)
    state = _NewtonSearch(images, base, target, AIM * tolerance, max_gradients, quantise)
    while True:
        walking, closing = state.rows_in(state.WALKING), state.rows_in(state.CLOSING)
        aside = state.rows_in(state.SIDESTEPPING)
        if len(closing) >= batch_size or (len(closing) and not len(walking)):
            state.close(closing[:batch_size], logits_of)
        elif len(walking):
            state.walk(walking[:batch_size], logits_of)
        elif len(aside):
            state.sidestep(aside[:batch_size], logits_of)
        else:
            break
    return _judged(
        state.direction,
        state.scale,
        images,
        base,
        target,
        tolerance,
        batch_size,
        reference or logits_of,
        state.status,
        state.gradients,
        state.forwards,
    )


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
    max_gradients: int = 10,
    batch_size: int = 64,
    step_size: float = 0.3,
    epsilon: float = 1e-4,
    bound: float = 2.5,
    probabilities: bool = False,
    reference: LogitsFunction | None = None,
) -> SearchResult:
    """The iterative rule of Heo et al. (2019, equation 5) as in their released code, for comparison.

    In normalised space, x <- clamp(x - step_size (L + epsilon) grad L / ||grad L||) with L = score_b - score_k, until
    the top class is no longer the base class, at most `max_gradients` times. The results lie beyond the boundary, so
    few of them count as converged.

    Args:
        mean, std: (C, 1, 1), the normalisation of the network.
        step_size: eta, per unit of L, in normalised units.
        epsilon: added to L.
        bound: normalised pixels are clamped to [-bound, bound].
        probabilities: scores are softmax outputs instead of logits.

    Other arguments and errors are those of `newton`.
    """
    _check(images, base, target)

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
        left = scores.argmax(1) != base[rows]
        bad = ~(torch.isfinite(norm) & (norm > 0)) & ~left
        status[rows[bad]] = Status.BAD_GRADIENT
        status[rows[left & (gradients[rows] == 1)]] = Status.BASE_MISCLASSIFIED
        moves = ~(left | bad)
        step = per_row(step_size * (loss + epsilon) / norm) * gradient
        x[rows[moves]] = (x[rows] - step)[moves].clamp(-bound, bound)
        active[rows] = moves & (gradients[rows] < max_gradients)
    direction, scale = as_ray((x - start) * std, quantise=True)
    return _judged(
        direction,
        scale,
        images,
        base,
        target,
        tolerance,
        batch_size,
        reference or logits_of,
        status,
        gradients,
        torch.zeros_like(gradients),
    )


def _check(images: Tensor, base: Tensor, target: Tensor) -> None:
    rows = len(images)
    if images.ndim != 4 or base.shape != (rows,) or target.shape != (rows,):
        raise ValueError(
            "expected images (R, C, H, W), base (R,) and target (R,), "
            f"got {tuple(images.shape)}, {tuple(base.shape)} and {tuple(target.shape)}"
        )
    if rows and bool((images.amin() < 0) | (images.amax() > 1)):
        raise ValueError(f"images must be in [0, 1], got {images.amin():.3g} to {images.amax():.3g}")
    if bool((base == target).any()):
        raise ValueError(f"base and target class are the same in row {int((base == target).int().argmax())}")


def _judged(
    direction: Tensor,
    scale: Tensor,
    images: Tensor,
    base: Tensor,
    target: Tensor,
    tolerance: float,
    batch_size: int,
    reference: LogitsFunction,
    status: Tensor,
    gradients: Tensor,
    forwards: Tensor,
) -> SearchResult:
    """Judge the samples with a fresh forward pass, except where the search ended for another reason."""
    perturbation = direction * per_row(scale)
    logits = logits_in_batches(reference, images + perturbation, batch_size)
    judged = judge(logits, base, target, tolerance)
    return SearchResult(
        direction,
        scale,
        logits,
        margin_of(logits, base, target),
        row_sum(perturbation.square()).sqrt(),
        torch.where(status == Status.CONVERGED, judged, status),
        gradients,
        forwards + 1,
    )
