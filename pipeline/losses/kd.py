"""Softened outputs of the teacher with constant weight, as toolboxes have it since 2020 (Tian et al., 2020)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pipeline.core.parameters import NotNegative, Positive, Section
from pipeline.training.term import FeatureShapes, Step, Term


class KdTerm(Term):
    """The mean divergence of the softened outputs from the teacher's, times T^2 and a weight."""

    class Parameters(Section):
        """Parameters of this loss."""

        temperature: Positive
        weight: NotNegative

    takes_stacks = True

    def __init__(self, parameters: Parameters, shapes: FeatureShapes) -> None:
        super().__init__(parameters, shapes)
        self.given = parameters

    def forward(self, step: Step) -> Tensor:
        losses = softened_divergence(step.logits, step.teacher_batch.teacher_logits, self.given.temperature)
        return self.given.weight * losses.mean(-1)


def softened_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || student) of softened outputs, times T^2, per sample.

    The factor keeps the size of the gradients at any temperature (Hinton et al., 2015).

    Args:
        student_logits: (..., classes).
        teacher_logits: (..., classes).
        temperature: T, above 0.

    Returns:
        (...), in nats times T^2, at least 0.

    Example:
        >>> import torch
        >>> softened_divergence(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), temperature=2.0)
        tensor([0.4438])
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
