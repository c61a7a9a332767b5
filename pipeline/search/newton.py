"""The default boundary search: Newton steps to the boundary, then a root on the quantised ray."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import ClassVar, Self

import torch
from torch import Tensor

from pipeline.core.parameters import Search
from pipeline.core.status import Status
from pipeline.networks.classifier import Classifier
from pipeline.search.boundary import (
    LogitsFunction,
    Problem,
    SearchResult,
    conclude,
    judge,
    margin_and_gradient,
    margin_of,
    probability_margin,
)
from pipeline.search.geometry import as_ray, largest_scale, per_row, project, project_on_two, row_sum

OVERSHOOT = 0.1  # relative: aim past the boundary, so that the end of a ray brackets it
OVERSHOOT_LOGITS = 0.01
NEAR, NEAR_LOGITS = 0.3, 0.2  # of the first margin, or at least: from here linearised margins are trusted
MAX_PROBES = 12  # forward passes on one ray
MAX_OPEN_PROBES = 4  # the same while all of them fell short of the boundary
CLEARANCE = 0.5  # logits by which a third class is to fall below the pair
PASS_SIZES = (32, 256)  # rows on a GPU, beside whole batches
AIM = 0.95  # of the tolerance, where the search stops: the rest is for rounding elsewhere


class Phase(IntEnum):
    """What a row needs next."""

    WALK = 0
    """A gradient of the margin, by which a ray to the boundary is laid."""
    SIDESTEP = 1
    """Two gradients, by which a ray is laid to where no third class is on top."""
    CLOSE = 2
    """A forward pass of the reference on its ray."""
    DONE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a search stops."""

    aim: float
    """The largest probability margin at which a sample counts as found."""
    max_gradients: int
    averaged: int
    """Gradients whose mean leads to the boundary."""
    levels: int | None
    """Of directions, which are rounded; None: they are not."""


@dataclass(slots=True, kw_only=True)
class Rows:
    """The state of R searches, row by row. A row's sample is `images + delta * delta_scale`."""

    images: Tensor
    base: Tensor
    target: Tensor
    start_margin: Tensor
    """(R,) logit margin at the image."""
    phase: Tensor
    """(R,) int64, values of `Phase`."""
    status: Tensor
    """(R,) uint8; NOT_CONVERGED until the row ends for another reason."""
    evaluations: Tensor
    """(R,) int32, gradients so far."""
    forwards: Tensor
    """(R,) int32, forward passes of the reference so far."""
    point: Tensor
    """(R, C, H, W) where the next gradient is taken."""
    gradient_sum: Tensor
    """(R, C, H, W) of the gradients of the margin so far."""
    averaged: Tensor
    """(R,) how many these are."""
    committed: Tensor
    """(R,) bool: a ray was closed in on before, and walks no longer begin at the image."""
    delta: Tensor
    """(R, C, H, W) direction of the ray from the image on which the root of the margin is sought."""
    delta_scale: Tensor
    """(R,) where on the ray the reference is asked next, or was asked last when the row is done."""
    slope: Tensor
    """(R,) of the margin along the ray."""
    inside: Tensor
    """(R,) largest scale known to be on the image's side of the boundary."""
    outside: Tensor
    """(R,) smallest scale known to be beyond it; infinite if there is none."""
    probes: Tensor
    """(R,) int32, forward passes on this ray."""
    last_scale: Tensor
    """(R,) of the last probe."""
    last_margin: Tensor
    """(R,) of the last probe."""
    boundary_logits: Tensor
    """(R, classes) of the reference at the last probe."""
    found: Tensor
    """(R,) bool: the last probe was on the boundary."""

    @classmethod
    def at_start(cls, problem: Problem) -> Self:
        """Return the rows of a problem before any search: those that the reference gets right have to walk."""
        images, logits = problem.images, problem.logits
        zeros = images.new_zeros(len(images))
        counts = zeros.int()
        margin = margin_of(logits, problem.base, problem.target)
        is_base = (logits.argmax(1) == problem.base) & ~(margin <= 0)  # a NaN goes on, and ends at its gradient
        return cls(
            images=images,
            base=problem.base,
            target=problem.target,
            start_margin=margin,
            phase=torch.where(is_base, Phase.WALK, Phase.DONE),
            status=torch.where(is_base, Status.NOT_CONVERGED, Status.BASE_MISCLASSIFIED).to(torch.uint8),
            evaluations=counts.clone(),
            forwards=counts.clone(),
            point=images.clone(),
            gradient_sum=torch.zeros_like(images),
            averaged=zeros.clone(),
            committed=zeros.bool(),
            delta=torch.zeros_like(images),
            delta_scale=zeros.clone(),
            slope=zeros.clone(),
            inside=zeros.clone(),
            outside=torch.full_like(zeros, torch.inf),
            probes=counts.clone(),
            last_scale=zeros.clone(),
            last_margin=zeros.clone(),
            boundary_logits=logits.clone(),
            found=zeros.bool(),
        )

    def take(self, index: Tensor) -> Self:
        """Return copies of some rows (n,)."""
        return type(self)(**{name: getattr(self, name)[index] for name in _FIELDS})

    def put(self, index: Tensor, part: Self) -> None:
        """Write rows that were taken back to their places (n,)."""
        for name in _FIELDS:
            if name not in _CONSTANT:
                getattr(self, name)[index] = getattr(part, name)

    def first(self, count: int) -> Self:
        """Return the first rows, without a copy."""
        return type(self)(**{name: getattr(self, name)[:count] for name in _FIELDS})

    def failed_at_gradient(self, bad: Tensor, before: Self) -> Self:
        """Return these rows, but those that are `bad` (R,) as they were `before`, and done with BAD_GRADIENT."""
        kept = ("evaluations", *_CONSTANT)
        chosen = {
            name: torch.where(_like(bad, getattr(self, name)), getattr(before, name), getattr(self, name))
            for name in _FIELDS
            if name not in kept
        }
        rows = replace(self, **chosen)
        rows.status = torch.where(bad, Status.BAD_GRADIENT, rows.status).to(torch.uint8)
        rows.phase = torch.where(bad, Phase.DONE, rows.phase)
        return rows


_FIELDS = tuple(field.name for field in fields(Rows))
_CONSTANT = ("images", "base", "target", "start_margin")


def _like(mask: Tensor, values: Tensor) -> Tensor:
    """Return a mask (R,) with as many axes as values (R, ...)."""
    return mask.view(-1, *[1] * (values.ndim - 1))


def walk(rows: Rows, logits_of: LogitsFunction, limits: Limits) -> Rows:
    """Take one gradient at each row's point, and lay a ray to where the linearised margin is zero."""
    logits, margin, gradient = margin_and_gradient(logits_of, rows.point, rows.base, rows.target)
    evaluations = rows.evaluations + 1
    first = evaluations == 1
    third = third_above(logits, rows.base, rows.target) & ~first
    steepest = gradient.abs().amax((1, 2, 3))
    bad = ~(torch.isfinite(margin) & torch.isfinite(steepest) & (steepest > 0))
    margin = torch.where(first, rows.start_margin, margin)

    # Near the boundary, its nearest point to the image is sought with the mean of the gradients so far: that sheds
    # their noise, and the detours of the steps before. Once such a ray fell short, only go on.
    trusted = margin <= (NEAR * rows.start_margin).clamp(min=NEAR_LOGITS)
    from_image = (first | trusted) & ~rows.committed
    gradient_sum, averaged = rows.gradient_sum + gradient, rows.averaged + 1
    step = margin.clamp(min=0) * (1 + OVERSHOOT) + OVERSHOOT_LOGITS
    end = project(
        torch.where(per_row(from_image), rows.images, rows.point),
        torch.where(per_row(from_image), gradient_sum / per_row(averaged), gradient),
        torch.where(from_image, rows.start_margin, step),
    )
    linearised = margin + row_sum(gradient * (rows.images - rows.point))
    enough = from_image & ~first & (averaged >= limits.averaged)
    enough |= from_image & third  # which more gradients of the margin would not put down
    closing = enough | rows.committed | (evaluations >= limits.max_gradients)
    aside = closing & third & may_sidestep(evaluations, limits)
    walked = replace(
        lay_ray(rows, end, gradient, linearised, from_image, limits),
        evaluations=evaluations,
        gradient_sum=gradient_sum,
        averaged=averaged,
        committed=rows.committed | closing,
        phase=torch.where(aside, Phase.SIDESTEP, torch.where(closing, Phase.CLOSE, Phase.WALK)),
    )
    return walked.failed_at_gradient(bad, rows)


def sidestep(rows: Rows, logits_of: LogitsFunction, limits: Limits) -> Rows:
    """Move along the boundary, from where a third class is on top near it, until it is not.

    A Newton step on two linearised constraints: the margin stays zero, and the third class falls below the pair.
    """
    x = rows.point.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(x)
        margin = margin_of(logits, rows.base, rows.target)
        excess = excess_of(logits, rows.base, rows.target)
        (gradient,) = torch.autograd.grad(margin.sum(), x, retain_graph=True)
        (excess_gradient,) = torch.autograd.grad(excess.sum(), x)
    x, margin, excess = x.detach(), margin.detach(), excess.detach()
    bad = ~torch.isfinite(row_sum(gradient.abs() + excess_gradient.abs()))
    end = project_on_two(x, gradient, excess_gradient, margin + OVERSHOOT_LOGITS, excess * (1 + OVERSHOOT) + CLEARANCE)
    linearised = margin + row_sum(gradient * (rows.images - x))
    stepped = replace(
        lay_ray(rows, end, gradient, linearised, torch.ones_like(bad), limits),
        evaluations=rows.evaluations + 2,
        phase=torch.full_like(rows.phase, Phase.CLOSE),
    )
    return stepped.failed_at_gradient(bad, rows)


def lay_ray(rows: Rows, end: Tensor, gradient: Tensor, linearised: Tensor, from_image: Tensor, limits: Limits) -> Rows:
    """Search next on the ray from each image towards `end`, first where the linearised margin is zero on it.

    Args:
        rows: the searches.
        end: (R, C, H, W).
        gradient: (R, C, H, W), the last one.
        linearised: (R,) margin at the image by the last gradient's linear function.
        from_image: (R,) rows whose `end` is an estimate; of others it is where to go.
        limits: whether directions are rounded.
    """
    delta, full = as_ray(end - rows.images, limits.levels)
    slope = row_sum(gradient * delta)
    scale = -linearised / slope
    sound = from_image & (slope < 0) & (scale > 0.5 * full) & (scale < 1.5 * full)
    scale = torch.where(sound, torch.minimum(scale, largest_scale(rows.images, delta, bool(limits.levels))), full)
    reached = (rows.images + delta * per_row(scale)).clamp(0, 1)
    return replace(
        rows,
        point=torch.where(per_row(sound), reached, end),
        delta=delta,
        slope=slope,
        delta_scale=scale,
        inside=torch.zeros_like(scale),
        outside=torch.full_like(scale, torch.inf),
        probes=torch.zeros_like(rows.probes),
    )


def close(rows: Rows, logits_of: LogitsFunction, limits: Limits) -> Rows:
    """Evaluate the margin at each row's scale, and take a secant step that stays inside the bracket."""
    images, delta, scale = rows.images, rows.delta, rows.delta_scale
    sample = images + delta * per_row(scale)
    logits = logits_of(sample)
    margin = margin_of(logits, rows.base, rows.target)
    probes = rows.probes + 1
    secant = (margin - rows.last_margin) / (scale - rows.last_scale)
    slope = torch.where((probes > 1) & torch.isfinite(secant) & (secant < 0), secant, rows.slope)
    inside = torch.where(margin > 0, scale, rows.inside)
    outside = torch.where(margin <= 0, scale, rows.outside)
    bracketed = torch.isfinite(outside)
    limit = largest_scale(images, delta, bool(limits.levels))

    step = scale - margin / slope
    otherwise = torch.where(bracketed, (inside + outside) / 2, 1.5 * scale)
    sound = (step > inside) & (step < outside) & (step < 1.5 * scale)
    step = torch.minimum(torch.where(sound, step, otherwise), limit)

    found = probability_margin(margin) <= limits.aim
    short = ~found & ~bracketed & ((scale >= limit) | (probes >= MAX_OPEN_PROBES))
    over = found | (probes >= MAX_PROBES) | (short & (rows.evaluations >= limits.max_gradients))
    third = found & (judge(logits, rows.base, rows.target, 1.0) == Status.THIRD_CLASS)
    aside = (third | third_above(logits, rows.base, rows.target)) & may_sidestep(rows.evaluations, limits)
    phase = torch.where(over, Phase.DONE, torch.where(short, Phase.WALK, Phase.CLOSE))
    return replace(
        rows,
        forwards=rows.forwards + 1,
        probes=probes,
        point=torch.where(per_row(short | aside), sample.clamp(0, 1), rows.point),
        delta_scale=torch.where(found | short, scale, step),
        slope=slope,
        last_margin=margin,
        last_scale=scale,
        boundary_logits=logits,
        found=found,
        inside=inside,
        outside=outside,
        phase=torch.where(aside, Phase.SIDESTEP, phase),
    )


def excess_of(logits: Tensor, base: Tensor, target: Tensor) -> Tensor:
    """Return by how much (R,) the best of the other logits (R, classes) is above the mean of the pair."""
    pair = torch.stack([base, target], 1)
    return logits.scatter(1, pair, -torch.inf).amax(1) - logits.gather(1, pair).mean(1)


def third_above(logits: Tensor, base: Tensor, target: Tensor) -> Tensor:
    """Return where (R,) a third class is so far up that it will be on top where base and target meet."""
    return excess_of(logits, base, target) > margin_of(logits, base, target).abs()


def may_sidestep(evaluations: Tensor, limits: Limits) -> Tensor:
    """Return where (R,) two more gradients are allowed."""
    return evaluations + 2 <= limits.max_gradients


@dataclass(frozen=True, slots=True, kw_only=True)
class NewtonSearch:
    """Find samples on the boundary between base and target class, near their images (default search).

    Newton steps on the logit margin lead to the boundary. There the nearest point of a linearised boundary is taken
    from the image, exactly within the box [0, 1], where the linear function has the mean of the gradients so far. The
    ray from the image through it is rounded to int8, and the root of the margin on that rounded ray is closed in on by
    forward passes alone. So what is stored is what was searched.

    Example:
        >>> weight = torch.tensor([[4.0, 0.0], [-4.0, 0.0]])  # a boundary where the first pixel is 0.5
        >>> image = torch.tensor([0.9, 0.4]).view(1, 1, 1, 2)
        >>> logits_of = lambda x: x.flatten(1) @ weight.T + torch.tensor([-2.0, 2.0])
        >>> base, target = torch.tensor([0]), torch.tensor([1])
        >>> problem = Problem(
        ...     images=image, base=base, target=target, logits=logits_of(image), reference=logits_of, fast=logits_of
        ... )
        >>> found = NewtonSearch()(problem)
        >>> found.status, found.perturbation.flatten(), found.distance
        (tensor([0], dtype=torch.uint8), tensor([-0.4000,  0.0000]), tensor([0.4000]))
    """

    half_gradients: ClassVar[bool] = True
    draws: ClassVar[bool] = False

    max_gradients: int = 20
    """Gradient evaluations per row."""
    averaged: int = 3
    """Gradients whose mean leads to the boundary, where the first ones come near it.

    One alone is noisy. The mean of three leads to a sample about 10 % nearer than two steps of one each, of seven to
    one as near as what a hundred steps of DDN return.
    """

    @classmethod
    def of(cls, given: Search, teacher: Classifier) -> NewtonSearch:
        """Make the search that the parameters ask for."""
        return cls(max_gradients=given.max_gradients)

    @torch.no_grad()
    def __call__(self, problem: Problem) -> SearchResult:
        limits = Limits(
            aim=AIM * problem.tolerance,
            max_gradients=self.max_gradients,
            averaged=self.averaged,
            levels=problem.levels,
        )
        rows = Rows.at_start(problem)
        steps = {
            Phase.WALK: (walk, problem.fast),
            Phase.SIDESTEP: (sidestep, problem.fast),
            Phase.CLOSE: (close, problem.reference),
        }
        while chosen := next_rows(rows.phase, problem.batch_size):
            phase, index = chosen
            step, network = steps[phase]
            done = step(rows.take(filled_up(index, problem.batch_size)), network, limits)
            rows.put(index, done.first(len(index)))
        # Found samples were judged when they were; the others end as they are.
        lost = (~rows.found & (rows.status != Status.BASE_MISCLASSIFIED)).nonzero().squeeze(1)
        if len(lost):
            samples = rows.images[lost] + rows.delta[lost] * per_row(rows.delta_scale[lost])
            rows.boundary_logits[lost] = problem.reference_logits(samples)
            rows.forwards[lost] += 1
        return conclude(
            problem,
            delta=rows.delta,
            delta_scale=rows.delta_scale,
            boundary_logits=rows.boundary_logits,
            status=rows.status,
            evaluations=rows.evaluations,
            forwards=rows.forwards,
        )


def filled_up(index: Tensor, batch_size: int) -> Tensor:
    """Return rows (n,) to compute, on a GPU filled up with the first one to one of few sizes.

    There each new size costs cuDNN a plan, and rows without need cost next to nothing; a CPU computes as few as it can.
    """
    if index.device.type == "cpu":
        return index
    size = next(size for size in (*PASS_SIZES, batch_size) if size >= len(index))
    return torch.cat([index, index[:1].expand(size - len(index))])


def next_rows(phases: Tensor, batch_size: int) -> tuple[Phase, Tensor] | None:
    """Choose the phase to run, and the first rows (n,) that are in it, `batch_size` at most; None when all are done.

    Whole batches of cheap forward passes come first: they free rows. A part of a batch waits until no row walks, and
    sidesteps, which are rare, until nothing else is left, so that they come together. The host waits for the device
    once, for the counts.

    Args:
        phases: (R,) values of `Phase`.
        batch_size: rows of a pass.

    Example:
        >>> next_rows(torch.tensor([Phase.CLOSE, Phase.WALK, Phase.DONE, Phase.WALK]), batch_size=8)
        (<Phase.WALK: 0>, tensor([1, 3]))
    """
    counts = (phases[:, None] == torch.arange(len(Phase), device=phases.device)).sum(0).tolist()
    if counts[Phase.CLOSE] >= batch_size or (counts[Phase.CLOSE] and not counts[Phase.WALK]):
        phase = Phase.CLOSE
    elif counts[Phase.WALK]:
        phase = Phase.WALK
    elif counts[Phase.SIDESTEP]:
        phase = Phase.SIDESTEP
    else:
        return None
    before = sum(counts[:phase])
    return phase, phases.argsort(stable=True)[before : before + min(counts[phase], batch_size)]
