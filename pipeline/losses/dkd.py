"""Decoupled knowledge distillation (Zhao et al., 2022)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.parameters import NotNegative, Positive, Section
from pipeline.losses.kd import standardised
from pipeline.training.term import FeatureShapes, Step, Term


class DkdTerm(Term):
    """Both parts with their weights, which grow linearly to their whole over the first `warm_up` of training."""

    class Parameters(Section):
        """Parameters of this loss."""

        temperature: Positive
        target: NotNegative = Field(description="weight of the label's class against all others, alpha in the paper")
        non_target: NotNegative = Field(description="weight of the other classes among themselves, beta in the paper")
        warm_up: Annotated[float, Field(ge=0, le=1)] = Field(description="progress of training at which both are whole")
        standardised: bool = Field(False, description="logits are brought to mean 0 and deviation 1 before")

    takes_stacks = True

    def __init__(self, parameters: Parameters, shapes: FeatureShapes) -> None:
        super().__init__(parameters, shapes)
        self.given = parameters

    def forward(self, step: Step) -> Tensor:
        given, batch = self.given, step.teacher_batch
        logits = step.logits, batch.teacher_logits
        if given.standardised:
            logits = standardised(logits[0]), standardised(logits[1])
        parts = decoupled_divergence(*logits, batch.labels, given.temperature)
        warmth = min(step.progress / given.warm_up, 1.0) if given.warm_up else 1.0
        return warmth * (given.target * parts[0].mean(-1) + given.non_target * parts[1].mean(-1))


def decoupled_divergence(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the two parts of KL(teacher || student) of softened outputs, per sample, times T^2 (Zhao et al., 2022).

    Args:
        student_logits, teacher_logits: (..., classes).
        labels: (...) int64.
        temperature: T, above 0.

    Returns:
        (...) the divergence of the label's class against all others (TCKD), and (...) that of the other classes among
        themselves (NCKD), in nats, at least 0.

    Example:
        >>> student, teacher, labels = torch.zeros(1, 3), torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
        >>> decoupled_divergence(student, teacher, labels, temperature=1.0)  # the other classes are equal in both
        (tensor([0.4330]), tensor([0.]))
    """
    label = F.one_hot(labels, student_logits.shape[-1]).bool()
    binary, others = [], []
    for logits in (student_logits / temperature, teacher_logits / temperature):
        log_probabilities = F.log_softmax(logits, -1)
        rest = log_probabilities.masked_fill(label, -torch.inf)
        binary.append(
            torch.cat([log_probabilities.gather(-1, labels[..., None]), rest.logsumexp(-1, keepdim=True)], -1)
        )
        # The label's class takes no part: both logarithms are set to 0, and so is its share of the sum.
        others.append(F.log_softmax(logits.masked_fill(label, -torch.inf), -1).masked_fill(label, 0))
    target = (binary[1].exp() * (binary[1] - binary[0])).sum(-1)
    non_target = (others[1].exp().masked_fill(label, 0) * (others[1] - others[0])).sum(-1)
    return temperature**2 * target, temperature**2 * non_target
