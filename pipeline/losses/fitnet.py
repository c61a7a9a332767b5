"""Hints: a middle layer of the teacher, by regression from one of the student (FitNets: Romero et al., 2015)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.parameters import Layers, Positive
from pipeline.training.term import FeatureShapes, Step, Term, check_maps, connector


class FitNetTerm(Term):
    """The hint loss of each pair of layers with its weight; the regressors are trained along.

    It is minimised alone, in a first stage, as in the paper; or, without one, beside all other losses to the end, as in
    the code of Tian et al. (2020). The paper's regressor is a convolution that also shrinks larger maps; here the maps
    must have one size, and it is a 1x1 convolution.
    """

    class Parameters(Layers):
        """Parameters of this loss."""

        first_stage: Annotated[float, Field(ge=0, lt=1)] = Field(
            description="fraction of the epochs, spent on this loss alone; 0: it is in the sum with the others"
        )
        weight: Positive = 1.0

    def __init__(self, parameters: Parameters, shapes: FeatureShapes) -> None:
        super().__init__(parameters, shapes)
        self.first_stage, self.weight = parameters.first_stage, parameters.weight
        self.layers = parameters.pairs
        self.regressors = nn.ModuleList()
        for name, student, teacher in shapes.pairs(parameters):
            check_maps(f"of 'fitnet', {name}", student, teacher, same_size=True)
            self.regressors.append(connector(student, teacher))

    def forward(self, step: Step) -> Tensor:
        losses = [
            hint_loss(regressor(step.student_features[student]), step.teacher_features[teacher])
            for regressor, (student, teacher) in zip(self.regressors, self.layers, strict=True)
        ]
        return self.weight * sum(losses, step.logits.new_zeros(()))


def hint_loss(guided: Tensor, hint: Tensor) -> Tensor:
    """Return half the squared error per element: 1/2 mean (r(v) - u)^2 (Romero et al., 2015, equation 3).

    The paper sums over elements. The mean trains with the same rate whatever the size of the layer.

    Args:
        guided: (N, C, H, W) the student's features, through the regressor.
        hint: (N, C, H, W) the teacher's.

    Returns:
        Scalar, at least 0.

    Example:
        >>> import torch
        >>> hint_loss(torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 2, 2))
        tensor(0.5000)
    """
    return F.mse_loss(guided, hint) / 2
