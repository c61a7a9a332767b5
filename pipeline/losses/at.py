"""Activation-based attention transfer (Zagoruyko and Komodakis, 2017)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pipeline.core.parameters import Layers, Positive
from pipeline.training.term import FeatureShapes, Step, Term, check_maps


class AtTerm(Term):
    """The attention loss, summed over pairs of layers, with its weight."""

    class Parameters(Layers):
        """Parameters of this loss."""

        weight: Positive

    def __init__(self, parameters: Parameters, shapes: FeatureShapes) -> None:
        super().__init__(parameters, shapes)
        self.weight = parameters.weight
        self.layers = parameters.pairs
        for name, student, teacher in shapes.pairs(parameters):
            check_maps(f"of 'at', {name}", student, teacher, same_size=True)

    def forward(self, step: Step) -> Tensor:
        losses = [
            attention_loss(step.student_features[student], step.teacher_features[teacher])
            for student, teacher in self.layers
        ]
        return self.weight * sum(losses, step.logits.new_zeros(()))


def attention_map(features: Tensor) -> Tensor:
    """Return where a layer is active: the mean of its squared channels, of length 1.

    Args:
        features: (N, C, H, W).

    Returns:
        (N, H * W) with rows of Euclidean length 1, or 0 where nothing is active.

    Example:
        >>> import torch
        >>> attention_map(torch.tensor([3.0, 4.0, 0.0, 0.0]).sqrt().view(1, 1, 2, 2))
        tensor([[0.6000, 0.8000, 0.0000, 0.0000]])
    """
    return F.normalize(features.square().mean(1).flatten(1))


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of attention maps, over elements and samples, as in the code of the authors.

    Args:
        student, teacher: (N, C, H, W), of one height and width; channels may differ.

    Returns:
        Scalar in [0, 2 / (H * W)].
    """
    return F.mse_loss(attention_map(student), attention_map(teacher))
