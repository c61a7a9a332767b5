"""Geometry of the boundary search, on batches of images: projections within the box [0, 1]^d, and rays."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_LEVELS = 127  # that int8 can hold each way
PROJECTION_STEPS = 6  # each accounts for the pixels that saturated in the last one
ROUNDING = 1e-6  # relative: a fall that is so nearly as asked is not improved


def per_row(values: Tensor) -> Tensor:
    """Return (R,) as (R, 1, 1, 1), to scale images row by row."""
    return values[:, None, None, None]


def row_sum(images: Tensor) -> Tensor:
    """Return (R, C, H, W) summed to (R,)."""
    return images.sum((1, 2, 3))


def may_hold(mask: Tensor) -> bool:
    """Return whether a mask (R,) holds in any row, where that is known at no cost; elsewhere True.

    It is for work that changes nothing in rows where the mask does not hold: a GPU does it in less time than the host
    would wait for the answer.
    """
    return mask.device.type != "cpu" or bool(mask.any())


def project(origin: Tensor, gradient: Tensor, decrease: Tensor) -> Tensor:
    """Return the point of the box [0, 1]^d nearest to `origin` at which a linear margin has fallen by `decrease`.

    It is clip(origin - l * gradient, 0, 1) for the l at which the fall is as asked. The fall is concave and piecewise
    linear in l, so Newton's method from l = decrease / ||gradient||^2 approaches it from below, one step for each
    round of newly saturated pixels; where most pixels saturate, the last per cent may be missing. Where the box
    allows no such fall, the corner of the largest fall is returned.

    Args:
        origin: (R, C, H, W) in [0, 1].
        gradient: (R, C, H, W) of the margin, finite, not all zero in any row.
        decrease: (R,) of the margin, above 0.
    """
    steepest = gradient.abs().amax((1, 2, 3))
    slopes, fall = gradient / per_row(steepest), decrease / steepest  # so that no square underflows
    largest = row_sum(slopes.clamp(min=0) * origin - slopes.clamp(max=0) * (1 - origin))
    aim = torch.minimum(fall, largest)
    squares = slopes.square()
    length = aim / row_sum(squares)
    for _ in range(PROJECTION_STEPS):
        unclipped = origin - per_row(length) * slopes
        point = unclipped.clamp(0, 1)
        missing = aim - row_sum(slopes * (origin - point))
        short = missing > ROUNDING * aim
        if not may_hold(short):
            break
        slope = row_sum(squares * (unclipped == point))
        length = length + torch.where(short & (slope > 0), missing / slope, 0)
    else:
        point = (origin - per_row(length) * slopes).clamp(0, 1)
    saturated = fall >= largest
    if may_hold(saturated):
        corner = torch.where(slopes == 0, origin, (slopes < 0).to(origin.dtype))
        point = torch.where(per_row(saturated), corner, point)
    return point


def project_on_two(
    origin: Tensor, first: Tensor, second: Tensor, first_decrease: Tensor, second_decrease: Tensor
) -> Tensor:
    """Return a point of the box [0, 1]^d near `origin` at which two linear functions have fallen as asked.

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


def as_ray(perturbation: Tensor, levels: int | None) -> tuple[Tensor, Tensor]:
    """Split perturbations into a direction and the scale at which the direction reaches them.

    Args:
        perturbation: (R, C, H, W).
        levels: largest magnitude of the direction, which is rounded to whole numbers; None: it is 1, and not rounded.

    Returns:
        direction (R, C, H, W) and scale (R,), 0 for a perturbation of zero.
    """
    scale = perturbation.abs().amax((1, 2, 3)) / (levels or 1)
    direction = perturbation / per_row(torch.where(scale > 0, scale, 1))
    return direction.round() if levels else direction, scale


def largest_scale(images: Tensor, direction: Tensor, quantised: bool) -> Tensor:
    """Return the scale (R,) up to which the ray stays in the box, or within half a quantisation step of it.

    Args:
        images: (R, C, H, W) in [0, 1].
        direction: (R, C, H, W).
        quantised: the direction was rounded.
    """
    slack = 0.5 if quantised else 0.0
    room = torch.where(direction > 0, 1 - images, images) / (direction.abs() - slack)
    return torch.where(direction.abs() > slack, room, torch.inf).amin((1, 2, 3))
