"""Target classes: with which class a sample is to share its boundary."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def draw_targets(
    logits: NDArray[np.float32], labels: NDArray[np.int64], noise: NDArray[np.float64], targets: int
) -> NDArray[np.int64]:
    """Draw distinct target classes, with probability proportional to the teacher's softmax without the base class.

    Gumbel top-k (Kool et al., 2019) over the logits, in float64: 1 - q_b, by which a confident teacher's
    probabilities would be divided, underflows.

    Args:
        logits: (N, classes).
        labels: (N,), base classes.
        noise: (N, classes), uniform on [0, 1).
        targets: how many, at most classes - 1.

    Returns:
        (N, targets), in order of the draw.
    """
    inside = np.clip(noise, 2.0**-54, 1 - 2.0**-53)  # the logarithms of 0 and 1 are not wanted
    keys = logits.astype(np.float64) - np.log(-np.log(inside))
    keys = np.maximum(keys, np.finfo(np.float64).min)  # a class of probability 0 still comes before the base class
    np.put_along_axis(keys, labels[:, None], -np.inf, 1)
    return np.argsort(-keys, axis=1, kind="stable")[:, :targets]
