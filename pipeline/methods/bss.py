"""Softened outputs of the teacher on boundary-supporting samples (Heo et al., 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.config import Bss
from pipeline.methods.hinton import softened_cross_entropy
from pipeline.term import FeatureShapes, Step, Term


class BssTerm(Term):
    """The mean softened cross-entropy on one sample each of the base samples that are chosen in the batch."""

    def __init__(self, parameters: Bss, shapes: FeatureShapes) -> None:
        super().__init__(parameters, shapes)
        self.given = parameters

    def forward(self, step: Step) -> Tensor:
        given, batch = self.given, step.batch
        beta = boundary_weight(step.progress, given.start, given.zero_at)
        if beta == 0:
            return step.logits.new_zeros(())
        assert batch.teacher_logits is not None
        assert batch.usable is not None
        assert batch.boundary is not None
        count = max(1, int(given.fraction * len(batch.labels)))
        chosen = select_base_samples(step.logits.detach(), batch.teacher_logits, batch.labels, batch.usable, count)
        found = batch.boundary(chosen.rows)
        with nullcontext() if given.moves_statistics else running_statistics_kept(step.student):
            losses = softened_cross_entropy(step.student(found.samples), found.teacher_logits, given.temperature)
        return beta * mean_over_selected(losses, chosen.weights * found.usable)


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

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0], [1, 0], [0, 1]]), torch.tensor([[1.0, 0], [3, 0], [1, 0]])
        >>> labels, usable = torch.tensor([0, 0, 0]), torch.tensor([True, True, True])
        >>> select_base_samples(student, teacher, labels, usable, count=2).rows  # the student misclassifies row 2
        tensor([1, 0])
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


def boundary_weight(progress: float, start: float, zero_at: float) -> float:
    """beta(e): from `start` down to 0 at the fraction `zero_at` of training, and 0 from there on.

    Example:
        >>> boundary_weight(0.375, start=2.0, zero_at=0.75), boundary_weight(0.9, start=2.0, zero_at=0.75)
        (1.0, 0.0)
    """
    return max(0.0, start * (1 - progress / zero_at))


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch norm still normalises by the batch in training, but its running statistics do not move."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
