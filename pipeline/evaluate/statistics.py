"""Means over draws and seeds, their spread, and differences with standard errors."""

from __future__ import annotations

from math import hypot
from statistics import fmean
from typing import NamedTuple

import numpy as np

STANDARD_ERRORS = 2  # by which a difference is clear


class Estimate(NamedTuple):
    """A mean over draws and seeds."""

    mean: float
    deviation: float | None
    """Between seeds, mean over draws (ddof 1)."""
    error: float | None
    """Standard error of the mean."""
    runs: int


def estimate(values: list[list[float]]) -> Estimate | None:
    """Return mean and spread of values by draw and seed; None without any.

    Draws share their seeds: the squared standard error is that of the draws' means plus that of the seeds' means. For
    one draw it is that of the seeds.
    """
    flat = [value for draw in values for value in draw]
    if not flat:
        return None
    deviations = [float(np.std(draw, ddof=1)) for draw in values if len(draw) > 1]
    deviation = fmean(deviations) if deviations else None
    error = None
    if len({len(draw) for draw in values}) == 1 and len(flat) > 1:
        table = np.array(values)
        variances = [table.mean(1 - axis).var(ddof=1) / table.shape[axis] for axis in (0, 1) if table.shape[axis] > 1]
        error = float(sum(variances) ** 0.5)
    return Estimate(fmean(flat), deviation, error, len(flat))


class Difference(NamedTuple):
    """A mean less that of a reference."""

    value: float
    error: float | None
    """Standard error, as of independent runs."""

    @property
    def is_clear(self) -> bool:
        """It exceeds two standard errors."""
        return self.error is not None and abs(self.value) > STANDARD_ERRORS * self.error


def difference(ours: Estimate | None, theirs: Estimate | None) -> Difference | None:
    """Return a mean less that of a reference, as of independent runs; None where there is none of one of them."""
    if ours is None or theirs is None:
        return None
    error = None if ours.error is None or theirs.error is None else hypot(ours.error, theirs.error)
    return Difference(ours.mean - theirs.mean, error)


def number(value: float, scale: float, signed: bool = False) -> str:
    """Return a figure for a table: a percentage (scale 100) with one digit, another one with three.

    Example:
        >>> number(0.9412, 100), number(0.012, 1, signed=True)
        ('94.1', '+0.012')
    """
    return f"{value * scale:{'+' if signed else ''}.{1 if scale == 100 else 3}f}"


def mean_cell(known: Estimate | None, scale: float, otherwise: str = "-") -> str:
    """Return a mean with its deviation between seeds, for a table; `otherwise` where there is none."""
    if known is None:
        return otherwise
    deviation = "" if known.deviation is None else f" ± {number(known.deviation, scale)}"
    return f"{number(known.mean, scale)}{deviation}"


def difference_cell(known: Difference | None, scale: float) -> str:
    """Return a difference with its standard error in brackets, for a table."""
    if known is None:
        return "-"
    error = "" if known.error is None else f" ({number(known.error, scale)})"
    return f"{number(known.value, scale, signed=True)}{error}"
