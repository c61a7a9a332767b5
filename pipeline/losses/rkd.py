"""Relational knowledge distillation (Park et al., 2019)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.parameters import Layers, NotNegative
from pipeline.training.term import FeatureShapes, Step, Term, check_embeddings, embedding


class RkdTerm(Term):
    """Distance-wise and angle-wise losses of each pair of layers; maps are averaged over positions."""

    class Parameters(Layers):
        """Parameters of this loss."""

        distance: NotNegative = Field(description="weight of the distances")
        angle: NotNegative = Field(description="weight of the angles")

    def __init__(self, parameters: Parameters, shapes: FeatureShapes) -> None:
        super().__init__(parameters, shapes)
        self.given = parameters
        for name, student, teacher in shapes.pairs(parameters):
            check_embeddings(f"of 'rkd', {name}", student, teacher)
        self.layers = parameters.pairs

    def forward(self, step: Step) -> Tensor:
        loss, given = step.logits.new_zeros(()), self.given
        for student, teacher in self.layers:
            pair = embedding(step.student_features[student]), embedding(step.teacher_features[teacher])
            loss = loss + given.distance * distance_loss(*pair) + given.angle * angle_loss(*pair)
        return loss


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Huber loss between relative distances of all pairs (Park et al., 2019, equations 5 to 7).

    Args:
        student, teacher: (N, C) embeddings; C may differ.

    Returns:
        Scalar, at least 0.
    """
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Huber loss between the cosines of the angles of all triplets (Park et al., 2019, equations 8 and 9).

    Args:
        student, teacher: (N, C) embeddings; C may differ.

    Returns:
        Scalar, at least 0; angles at a sample between the directions to two others.

    Example:
        >>> corner, line = torch.tensor([[0.0, 0], [1, 0], [0, 1]]), torch.tensor([[0.0, 0], [1, 0], [2, 0]])
        >>> angle_loss(corner, 2 * corner), angle_loss(corner, line)
        (tensor(0.), tensor(0.1296))
    """
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher))


def _relative_distances(embeddings: Tensor) -> Tensor:
    """Return (N, N) distances over their mean, 0 on the diagonal."""
    distances = _lengths(embeddings[:, None] - embeddings[None]).squeeze(2)
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / torch.where(mean > 0, mean, 1)


def _cosines(embeddings: Tensor) -> Tensor:
    """Return (N, N, N) cosines of the angles at each sample between two others; 0 without a direction."""
    apart = embeddings[None] - embeddings[:, None]
    lengths = _lengths(apart)
    directions = apart / torch.where(lengths > 0, lengths, 1)
    return directions @ directions.transpose(1, 2)


def _lengths(vectors: Tensor) -> Tensor:
    """Return (..., 1) Euclidean lengths, without a gradient where they are 0: there it would be infinite."""
    squared = vectors.square().sum(-1, keepdim=True)
    some = squared > 0
    return torch.where(some, torch.where(some, squared, 1).sqrt(), 0)
