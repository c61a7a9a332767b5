"""Are the outputs of a network logits, from which a boundary can be searched?"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-3  # of the length of logits, by which those of one image may differ
SUM = 1e-2  # by which the sum of an image's probabilities may differ from 1


def random_problem(logits: Tensor, again: Tensor) -> str | None:
    """Return that a network gives other logits (N, classes) for the same images once more; None where it does not."""
    tolerance = max(ROUNDING, 4 * torch.finfo(logits.dtype).eps)
    if bool((again - logits).norm() > tolerance * logits.norm()):
        return (
            "gives other logits each time it sees an image: leave out what is drawn at random in evaluation, as with "
            "F.dropout(x, training=self.training)"
        )
    return None


def probability_problem(logits: Tensor) -> str | None:
    """Return that what a network gives (N, classes) are probabilities; None where they are not."""
    if bool((logits >= 0).all() & ((logits.sum(1) - 1).abs() <= SUM).all()):
        return "gives probabilities, expected logits: leave out its softmax"
    return None
