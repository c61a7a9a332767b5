"""The default boundary search: Newton steps to the boundary, then a root on the quantised ray."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.boundary import (
    LogitsFunction,
    SearchResult,
    check_arguments,
    judge,
    judged,
    logits_in_batches,
    margin_and_gradient,
    margin_of,
    probability_margin,
)
from pipeline.projection import as_ray, per_row, project, project_on_two, row_sum
from pipeline.status import Status

OVERSHOOT = 0.1  # relative: aim past the boundary, so that the end of a ray brackets it
OVERSHOOT_LOGITS = 0.01
NEAR, NEAR_LOGITS = 0.3, 0.2  # of the first margin, or at least: from here linearised margins are trusted
MAX_PROBES = 12  # forward passes on one ray
MAX_OPEN_PROBES = 4  # the same while all of them fell short of the boundary
CLEARANCE = 0.5  # logits by which a third class is to fall below the pair
AIM = 0.95  # of the tolerance, where the search stops: the rest is for rounding elsewhere


def excess_of(logits: Tensor, base: Tensor, target: Tensor) -> Tensor:
    """(R,) by how much the best of the other logits (R, classes) is above the mean of the pair."""
    pair = torch.stack([base, target], 1)
    return logits.scatter(1, pair, -torch.inf).amax(1) - logits.gather(1, pair).mean(1)


def third_above(logits: Tensor, base: Tensor, target: Tensor) -> Tensor:
    """(R,) whether a third class is so far up that it will be on top where base and target meet, if nothing is done."""
    return excess_of(logits, base, target) > margin_of(logits, base, target).abs()


class _NewtonSearch:
    """The state of `newton` over R rows. A row walks (needs a gradient), closes (needs a forward pass) or is done."""

    WALKING, SIDESTEPPING, CLOSING, DONE = range(4)

    def __init__(
        self,
        images: Tensor,
        logits: Tensor,
        base: Tensor,
        target: Tensor,
        aim: float,
        max_gradients: int,
        wanted: int,
        quantise: bool,
    ) -> None:
        self.images, self.base, self.target = images, base, target
        self.aim, self.max_gradients, self.wanted, self.quantise = aim, max_gradients, wanted, quantise
        zeros = images.new_zeros(len(images))
        counts = zeros.int()
        self.start_margin = margin_of(logits, base, target)
        is_base = (logits.argmax(1) == base) & ~(self.start_margin <= 0)  # a NaN goes on, and ends at its gradient
        self.phase = torch.where(is_base, self.WALKING, self.DONE)
        self.status = torch.where(is_base, Status.CONVERGED, Status.BASE_MISCLASSIFIED).to(torch.uint8)
        self.logits = logits.clone()  # at the last sample that was looked at
        self.found = zeros.bool()  # that sample is on the boundary
        self.gradients, self.forwards, self.probes = counts.clone(), counts.clone(), counts.clone()
        self.point = images.clone()  # where the next gradient is taken
        self.gradient_sum, self.averaged = torch.zeros_like(images), zeros.clone()
        self.closed_once = zeros.bool()
        # The ray from the image on which the root of the margin is searched, as a function of the scale.
        self.direction, self.scale, self.slope = torch.zeros_like(images), zeros.clone(), zeros.clone()
        self.inside, self.outside = zeros.clone(), torch.full_like(zeros, torch.inf)
        self.last_scale, self.last_margin = zeros.clone(), zeros.clone()

    def rows_in(self, phase: int) -> Tensor:
        return (self.phase == phase).nonzero().squeeze(1)

    def walk(self, rows: Tensor, logits_of: LogitsFunction) -> None:
        """Take one gradient at each row's point, and lay a ray to where the linearised margin is zero."""
        self.gradients[rows] += 1
        logits, margin, gradient = margin_and_gradient(logits_of, self.point[rows], self.base[rows], self.target[rows])
        third = third_above(logits, self.base[rows], self.target[rows]) & (self.gradients[rows] > 1)
        steepest = gradient.abs().amax((1, 2, 3))
        good = torch.isfinite(margin) & torch.isfinite(steepest) & (steepest > 0)
        self.status[rows[~good]] = Status.BAD_GRADIENT
        self.phase[rows[~good]] = self.DONE
        rows, margin, gradient, third = rows[good], margin[good], gradient[good], third[good]
        images, point, start_margin = self.images[rows], self.point[rows], self.start_margin[rows]
        first = self.gradients[rows] == 1
        margin = torch.where(first, start_margin, margin)

        # Near the boundary, its nearest point to the image is sought with the mean of the gradients so far: that sheds
        # their noise, and the detours of the steps before. Once such a ray fell short, only go on.
        trusted = margin <= (NEAR * start_margin).clamp(min=NEAR_LOGITS)
        from_image = (first | trusted) & ~self.closed_once[rows]
        self.gradient_sum[rows] += gradient
        self.averaged[rows] += 1
        mean = self.gradient_sum[rows] / per_row(self.averaged[rows])
        step = margin.clamp(min=0) * (1 + OVERSHOOT) + OVERSHOOT_LOGITS
        end = project(
            torch.where(per_row(from_image), images, point),
            torch.where(per_row(from_image), mean, gradient),
            torch.where(from_image, start_margin, step),
        )
        linearised = margin + row_sum(gradient * (images - point))
        self._lay_ray(rows, end, gradient, linearised, from_image)
        enough = from_image & ~first & (self.averaged[rows] >= self.wanted)
        enough |= from_image & third  # which more gradients of the margin would not put down
        closing = enough | self.closed_once[rows] | (self.gradients[rows] >= self.max_gradients)
        self.closed_once[rows] |= closing
        self.phase[rows] = torch.where(closing, self.CLOSING, self.WALKING)
        self.phase[rows[closing & third & self._may_sidestep(rows)]] = self.SIDESTEPPING

    def sidestep(self, rows: Tensor, logits_of: LogitsFunction) -> None:
        """Where a third class is on top near the boundary or on it, move along the boundary until it is not.

        A Newton step on two linearised constraints: the margin stays zero, and the third class falls below the pair.
        """
        images, x = self.images[rows], self.point[rows].requires_grad_()
        with torch.enable_grad():
            logits = logits_of(x)
            margin = margin_of(logits, self.base[rows], self.target[rows])
            excess = excess_of(logits, self.base[rows], self.target[rows])
            (gradient,) = torch.autograd.grad(margin.sum(), x, retain_graph=True)
            (excess_gradient,) = torch.autograd.grad(excess.sum(), x)
        x, margin, excess = x.detach(), margin.detach(), excess.detach()
        self.gradients[rows] += 2
        good = torch.isfinite(row_sum(gradient.abs() + excess_gradient.abs()))
        self.status[rows[~good]] = Status.BAD_GRADIENT
        self.phase[rows[~good]] = self.DONE
        rows, images, x, gradient = rows[good], images[good], x[good], gradient[good]
        margin, excess, excess_gradient = margin[good], excess[good], excess_gradient[good]
        end = project_on_two(
            x, gradient, excess_gradient, margin + OVERSHOOT_LOGITS, excess * (1 + OVERSHOOT) + CLEARANCE
        )
        linearised = margin + row_sum(gradient * (images - x))
        self._lay_ray(rows, end, gradient, linearised, torch.ones_like(rows, dtype=torch.bool))
        self.phase[rows] = self.CLOSING

    def _lay_ray(self, rows: Tensor, end: Tensor, gradient: Tensor, linearised: Tensor, from_image: Tensor) -> None:
        """Search next on the ray from each image towards `end`, first where the linearised margin is zero on it.

        Args:
            linearised: margin at the image by the last gradient's linear function.
            from_image: rows whose `end` is an estimate; of others it is where to go.
        """
        direction, full = as_ray(end - self.images[rows], self.quantise)
        slope = row_sum(gradient * direction)
        scale = -linearised / slope
        sound = from_image & (slope < 0) & (scale > 0.5 * full) & (scale < 1.5 * full)
        scale = torch.where(sound, torch.minimum(scale, self._largest_scale(self.images[rows], direction)), full)
        self.point[rows] = torch.where(
            per_row(sound), (self.images[rows] + direction * per_row(scale)).clamp(0, 1), end
        )
        self.direction[rows], self.slope[rows], self.scale[rows] = direction, slope, scale
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
        aside = (third | third_above(logits, self.base[rows], self.target[rows])) & self._may_sidestep(rows)
        moved = short | aside
        self.point[rows[moved]] = (images + direction * per_row(scale))[moved].clamp(0, 1)
        self.scale[rows] = torch.where(found | short, scale, step)
        self.slope[rows], self.last_margin[rows], self.last_scale[rows] = slope, margin, scale
        self.logits[rows], self.found[rows] = logits, found
        self.inside[rows], self.outside[rows] = inside, outside
        self.phase[rows] = torch.where(over, self.DONE, torch.where(short, self.WALKING, self.CLOSING))
        self.phase[rows[aside]] = self.SIDESTEPPING

    def _may_sidestep(self, rows: Tensor) -> Tensor:
        return self.gradients[rows] + 2 <= self.max_gradients

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
    averaged: int = 3,
    batch_size: int = 256,
    quantise: bool = True,
    reference: LogitsFunction | None = None,
    logits: Tensor | None = None,
) -> SearchResult:
    """Find samples on the boundary between base and target class, near their images (default search).

    Newton steps on the logit margin lead to the boundary. There the nearest point of a linearised boundary is taken
    from the image, exactly within the box [0, 1], where the linear function has the mean of the gradients so far. The
    ray from the image through it is rounded to int8, and the root of the margin on that rounded ray is closed in on by
    forward passes alone. So what is stored is what was searched.

    Args:
        logits_of: pixels (n, C, H, W) in [0, 1] to logits (n, classes); differentiable. Gradients are taken of it, so
            it may be a faster and less precise network than `reference`.
        images: (R, C, H, W) float32 in [0, 1].
        base: (R,) int64, classes that the reference predicts for the images.
        target: (R,) int64, other classes.
        tolerance: largest probability margin tanh(|m| / 2) of a converged sample.
        max_gradients: gradient evaluations per row.
        averaged: gradients whose mean leads to the boundary, where the first ones come near it. One alone is noisy;
            the mean of three leads to a sample about 10 % nearer than two steps of one each, of seven to one as near
            as a hundred steps of a minimising attack.
        batch_size: rows per pass.
        quantise: round directions to int8; otherwise they stay float32.
        reference: network that decides where the boundary is, and whose logits are recorded; by default `logits_of`.
        logits: (R, classes) of the reference at the images; computed when not given.

    Raises:
        ValueError: the arguments do not fit each other.

    Example:
        >>> weight = torch.tensor([[4.0, 0.0], [-4.0, 0.0]])  # a boundary where the first pixel is 0.5
        >>> image = torch.tensor([0.9, 0.4]).view(1, 1, 1, 2)
        >>> logits_of = lambda x: x.flatten(1) @ weight.T + torch.tensor([-2.0, 2.0])
        >>> found = newton(logits_of, image, base=torch.tensor([0]), target=torch.tensor([1]))
        >>> found.status, found.perturbation.flatten(), found.distance
        (tensor([0], dtype=torch.uint8), tensor([-0.4000,  0.0000]), tensor([0.4000]))
    """
    check_arguments(images, base, target)
    reference = reference or logits_of
    known = logits is not None
    if logits is None:
        logits = logits_in_batches(reference, images, batch_size)
    state = _NewtonSearch(images, logits, base, target, AIM * tolerance, max_gradients, averaged, quantise)
    while True:
        walking, closing = state.rows_in(state.WALKING), state.rows_in(state.CLOSING)
        aside = state.rows_in(state.SIDESTEPPING)
        if len(closing) >= batch_size or (len(closing) and not len(walking)):
            state.close(closing[:batch_size], reference)
        elif len(walking):
            state.walk(walking[:batch_size], logits_of)
        elif len(aside):
            state.sidestep(aside[:batch_size], logits_of)
        else:
            break
    # Found samples were judged when they were; the others end as they are.
    lost = (~state.found & (state.status != Status.BASE_MISCLASSIFIED)).nonzero().squeeze(1)
    if len(lost):
        samples = images[lost] + state.direction[lost] * per_row(state.scale[lost])
        state.logits[lost] = logits_in_batches(reference, samples, batch_size)
        state.forwards[lost] += 1
    return judged(
        state.direction,
        state.scale,
        state.logits,
        base,
        target,
        tolerance,
        state.status,
        state.gradients,
        state.forwards if known else state.forwards + 1,
    )
