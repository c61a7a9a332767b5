"""Relational knowledge distillation (Park et al., 2019)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import Rkd
from pipeline.term import FeatureShapes, Step, Term


class RkdTerm(Term):
    """Distance-wise and angle-wise losses of each pair of layers; maps are averaged over positions."""

    def __init__(self, parameters: Rkd, shapes: FeatureShapes) -> None:
        super().__init__(parameters, shapes)
        self.given = parameters
        self.layers = list(zip(parameters.student_layers, parameters.teacher_layers, strict=True))

    def forward(self, step: Step) -> Tensor:
        loss, given = step.logits.new_zeros(()), self.given
        for student, teacher in self.layers:
            pair = embedding(step.student_features[student]), embedding(step.teacher_features[teacher])
            loss = loss + given.distance * distance_loss(*pair) + given.angle * angle_loss(*pair)
        return loss


def embedding(features: Tensor) -> Tensor:
    """(N, C) of features (N, C, ...), by the mean over positions."""
    return features.flatten(2).mean(2) if features.ndim > 2 else features


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between distances of all pairs, each network's over their mean (Park et al., 2019, equations 5 to 7).

    Args:
        student, teacher: (N, C) embeddings; C may differ.

    Returns:
        Scalar, at least 0.
    """
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the cosines of the angles of all triplets (Park et al., 2019, equations 8 and 9).

    Args:
        student, teacher: (N, C) embeddings; C may differ.

    Returns:
        Scalar, at least 0; angles at a sample between the directions to two others.
    """
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher))


def _relative_distances(embeddings: Tensor) -> Tensor:
    """(N, N) distances over their mean, 0 on the diagonal."""
    squared = (embeddings[:, None] - embeddings[None]).square().sum(2)
    apart = squared > 0
    distances = torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)  # the root has no gradient at 0
    return distances / (distances.sum() / apart.sum().clamp(min=1)).clamp(min=1e-12)


def _cosines(embeddings: Tensor) -> Tensor:
    """(N, N, N): at each sample, the cosines of the angles between its directions to two others."""
    directions = F.normalize(embeddings[None] - embeddings[:, None], dim=2)
    return directions @ directions.transpose(1, 2)
