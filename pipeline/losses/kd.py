"""Softened outputs of the teacher with constant weight, as toolboxes have it since 2020 (Tian et al., 2020)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.parameters import NotNegative, Positive, Section
from pipeline.training.term import FeatureShapes, Step, Term

EPSILON = 1e-7  # as in the code of Sun et al.: constant logits become 0


class KdTerm(Term):
    """The mean divergence of the softened outputs from the teacher's, times T^2 and a weight."""

    class Parameters(Section):
        """Parameters of this loss."""

        temperature: Positive
        weight: NotNegative
        standardised: bool = Field(False, description="logits are brought to mean 0 and deviation 1 before")

    takes_stacks = True

    def __init__(self, parameters: Parameters, shapes: FeatureShapes) -> None:
        super().__init__(parameters, shapes)
        self.given = parameters

    def forward(self, step: Step) -> Tensor:
        logits = step.logits, step.teacher_batch.teacher_logits
        if self.given.standardised:
            logits = standardised(logits[0]), standardised(logits[1])
        losses = softened_divergence(*logits, self.given.temperature)
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


def standardised(logits: Tensor) -> Tensor:
    """Return logits less their mean, over their standard deviation, of each sample (Sun et al., 2024).

    A student may then differ from its teacher in the shift and scale of each sample's logits. The deviation is the one
    with classes - 1 in the denominator, as in the code of the authors.

    Args:
        logits: (..., classes), two or more.

    Returns:
        (..., classes) of mean 0 and standard deviation 1; 0 where all logits are equal.

    Example:
        >>> import torch
        >>> standardised(torch.tensor([[1.0, 3.0, 5.0]]))
        tensor([[-1.,  0.,  1.]])
    """
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + EPSILON)
