"""How similar two decision boundaries are: MagSim and AngSim (Heo et al., 2019), agreement and divergence.

Both compare the perturbations by which two classifiers' own searches reach the boundary between the same two classes
from the same image. Each is 1 for identical classifiers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def magnitude_similarity(preds: Tensor, target: Tensor) -> Tensor:
    """Return min(|p|, |t|) / max(|p|, |t|) per pair of perturbations, NaN where one of them is zero or not finite.

    Args:
        preds: (N, ...) perturbations of the student.
        target: (N, ...) perturbations of the teacher.

    Returns:
        (N,) float64 in (0, 1].

    Example:
        >>> magnitude_similarity(torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0, 0.0]]))
        tensor([0.5000], dtype=torch.float64)
    """
    first, second = _lengths(preds, target)
    return torch.minimum(first, second) / torch.maximum(first, second)


def angle_similarity(preds: Tensor, target: Tensor) -> Tensor:
    """Return the cosine of the angle between perturbations, per pair, NaN where one of them is zero or not finite.

    Args:
        preds: (N, ...) perturbations of the student.
        target: (N, ...) perturbations of the teacher.

    Returns:
        (N,) float64 in [-1, 1].

    Example:
        >>> angle_similarity(torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0, 0.0]]))
        tensor([0.6000], dtype=torch.float64)
    """
    first, second = _lengths(preds, target)
    dot = (preds.double() * target.double()).flatten(1).sum(1)
    return (dot / (first * second)).clamp(-1, 1)


def mag_sim(preds: Tensor, target: Tensor) -> Tensor:
    """Return MagSim: the mean of `magnitude_similarity` over the pairs where it is defined, NaN if there are none."""
    return magnitude_similarity(preds, target).nanmean()


def ang_sim(preds: Tensor, target: Tensor) -> Tensor:
    """Return AngSim: the mean of `angle_similarity` over the pairs where it is defined, NaN if there are none."""
    return angle_similarity(preds, target).nanmean()


def agreement(preds: Tensor, target: Tensor) -> Tensor:
    """Return the fraction of samples whose top class is the same by logits `preds` and `target`, both (N, classes)."""
    return (preds.argmax(1) == target.argmax(1)).double().mean()


def teacher_divergence(preds: Tensor, target: Tensor) -> Tensor:
    """Return the mean KL(teacher || student) in nats, from logits `preds` (student) and `target` (teacher)."""
    student, teacher = F.log_softmax(preds.double(), 1), F.log_softmax(target.double(), 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _lengths(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return norms (N,) of two sets of perturbations, NaN for pairs that are to be left out."""
    if preds.shape != target.shape or preds.ndim < 2:
        raise ValueError(f"expected two tensors (N, ...) of one shape, got {tuple(preds.shape)}, {tuple(target.shape)}")
    first, second = preds.double().flatten(1).norm(dim=1), target.double().flatten(1).norm(dim=1)
    usable = torch.isfinite(first) & torch.isfinite(second) & (first > 0) & (second > 0)
    return torch.where(usable, first, torch.nan), torch.where(usable, second, torch.nan)
