"""Means over draws and seeds, their spread, and differences with standard errors."""

from __future__ import annotations

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
    """Mean and spread of values by draw and seed; None without any.

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
