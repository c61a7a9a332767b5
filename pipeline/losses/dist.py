"""Relations between classes and between samples, by correlation with the teacher's (DIST: Huang et al., 2022)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional as F

from pipeline.core.parameters import NotNegative, Positive, Section
from pipeline.training.term import FeatureShapes, Step, Term

EPSILON = 1e-8  # as in the code of the authors: the correlation with a constant is 0


class DistTerm(Term):
    """Both relations with their weights, times T^2."""

    class Parameters(Section):
        """Parameters of this loss."""

        temperature: Positive
        inter: NotNegative = Field(description="weight of the relation of classes in a sample, beta in the paper")
        intra: NotNegative = Field(description="weight of the relation of samples in a class, gamma in the paper")

    takes_stacks = True

    def __init__(self, parameters: Parameters, shapes: FeatureShapes) -> None:
        super().__init__(parameters, shapes)
        self.given = parameters

    def forward(self, step: Step) -> Tensor:
        inter, intra = relation_losses(step.logits, step.teacher_batch.teacher_logits, self.given.temperature)
        return self.given.inter * inter + self.given.intra * intra


def relation_losses(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return how far softened outputs are from being correlated with the teacher's (Huang et al., 2022).

    One minus Pearson's correlation, times T^2: of each sample's outputs over the classes, mean over the samples; and of
    each class's outputs over the samples of the batch, mean over the classes. Where outputs are constant, as those of a
    class in a batch of one sample, the correlation counts as 0.

    Args:
        student_logits, teacher_logits: (..., N, classes).
        temperature: T, above 0.

    Returns:
        (...) the inter-class and (...) the intra-class loss, in [0, 2 T^2].

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        >>> inter, intra = relation_losses(teacher.flip(0), teacher, temperature=1.0)
        >>> print(f"{inter:.3f} {intra:.3f}")  # in the third class both samples are alike
        1.500 1.667
    """
    student, teacher = (F.softmax(logits / temperature, -1) for logits in (student_logits, teacher_logits))
    inter = 1 - _correlation(student, teacher).mean(-1)
    intra = 1 - _correlation(student.mT, teacher.mT).mean(-1)
    return temperature**2 * inter, temperature**2 * intra


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return Pearson's correlation (...) over the last dimension."""
    first, second = (values - values.mean(-1, keepdim=True) for values in (first, second))
    lengths: Tensor = vector_norm(first, dim=-1) * vector_norm(second, dim=-1)
    return (first * second).sum(-1) / (lengths + EPSILON)
