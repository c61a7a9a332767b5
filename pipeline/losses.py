"""Losses of distillation: pure functions of logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def softened_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between the softened outputs of teacher and student, per sample.

    -sum_c softmax(teacher / T)_c log softmax(student / T)_c (Hinton et al., 2015), without the factor T^2, as in the
    code of Heo et al. (2019).

    Args:
        student_logits: (N, classes).
        teacher_logits: (N, classes).
        temperature: T, above 0.

    Returns:
        (N,), at least the entropy of the softened teacher.

    Example:
        >>> softened_cross_entropy(torch.zeros(1, 4), torch.zeros(1, 4), temperature=3.0)
        tensor([1.3863])
    """
    target = F.softmax(teacher_logits / temperature, dim=1)
    return -(target * F.log_softmax(student_logits / temperature, dim=1)).sum(1)


class Selection(NamedTuple):
    """Rows of a batch chosen for the boundary loss: a fixed count, where fillers have weight 0."""

    rows: Tensor
    """(M,) int64, distinct rows of the batch."""
    weights: Tensor
    """(M,) float32, 1 for a chosen row, 0 for a filler."""


def select_base_samples(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, usable: Tensor, count: int
) -> Selection:
    """Choose the base samples of the boundary loss (Heo et al., 2019).

    Candidates are the samples that teacher and student both classify correctly; of these, the ones are taken whose
    probabilities of the other classes differ most, by squared difference. The count is fixed so that the host never
    waits for the device.

    Args:
        student_logits: (N, classes), current.
        teacher_logits: (N, classes).
        labels: (N,) int64.
        usable: (N,) bool, samples that have a boundary-supporting sample.
        count: M, at most N.
    """
    student, teacher = F.softmax(student_logits, 1), F.softmax(teacher_logits, 1)
    difference = (student - teacher).square()
    score = difference.sum(1) - difference.gather(1, labels[:, None]).squeeze(1)
    candidate = (student_logits.argmax(1) == labels) & (teacher_logits.argmax(1) == labels) & usable
    top = torch.where(candidate, score, -1.0).topk(count)
    return Selection(top.indices, (top.values >= 0).to(student_logits.dtype))


def mean_over_selected(losses: Tensor, weights: Tensor) -> Tensor:
    """The mean of per-sample losses over rows of weight 1; 0 when none is chosen."""
    return torch.where(weights > 0, losses * weights, 0).sum() / weights.sum().clamp(min=1)


def hinton_weight(progress: float, start: float, end: float) -> float:
    """alpha(e): from `start` to `end`, linearly over training; progress e / E in [0, 1]."""
    return end + (start - end) * (1 - progress)


def boundary_weight(progress: float, start: float, zero_at: float) -> float:
    """beta(e): from `start` down to 0 at the fraction `zero_at` of training, and 0 from there on."""
    return max(0.0, start * (1 - progress / zero_at))
