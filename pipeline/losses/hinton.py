"""Softened outputs of the teacher (Hinton et al., 2015)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.parameters import NotNegative, Positive, Section
from pipeline.training.term import FeatureShapes, Step, Term


class HintonTerm(Term):
    """The mean softened cross-entropy with the teacher, with a weight that goes from `start` to `end`."""

    class Parameters(Section):
        """Parameters of this loss."""

        temperature: Positive
        start: NotNegative = Field(description="weight at the start of training")
        end: NotNegative = Field(description="weight at the end, linear in between")

    takes_stacks = True

    def __init__(self, parameters: Parameters, shapes: FeatureShapes) -> None:
        super().__init__(parameters, shapes)
        self.given = parameters

    def forward(self, step: Step) -> Tensor:
        losses = softened_cross_entropy(step.logits, step.teacher_batch.teacher_logits, self.given.temperature)
        return hinton_weight(step.progress, self.given.start, self.given.end) * losses.mean(-1)


def softened_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy between the softened outputs of teacher and student, per sample.

    -sum_c softmax(teacher / T)_c log softmax(student / T)_c (Hinton et al., 2015), without the factor T^2, as in the
    code of Heo et al. (2019).

    Args:
        student_logits: (..., classes).
        teacher_logits: (..., classes).
        temperature: T, above 0.

    Returns:
        (...), at least the entropy of the softened teacher.

    Example:
        >>> import torch
        >>> softened_cross_entropy(torch.zeros(1, 4), torch.zeros(1, 4), temperature=3.0)
        tensor([1.3863])
    """
    target = F.softmax(teacher_logits / temperature, dim=-1)
    return -(target * F.log_softmax(student_logits / temperature, dim=-1)).sum(-1)


def hinton_weight(progress: float, start: float, end: float) -> float:
    """Return alpha(e): from `start` to `end`, linearly over training; progress e / E in [0, 1]."""
    return end + (start - end) * (1 - progress)
