"""Flow of the solution procedure between layers (Yim et al., 2017)."""

from __future__ import annotations

from itertools import pairwise
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.parameters import Fraction, Layers, Positive
from pipeline.training.term import FeatureShapes, Step, Term, check_maps, connector


class FspTerm(Term):
    """The loss of the matrices between each layer and the next one, alone in a first stage.

    The paper's networks have the same channels. Where they differ, a 1x1 convolution, trained along, brings the
    student's to the teacher's.
    """

    class Parameters(Layers):
        """Parameters of this loss."""

        first_stage: Fraction = Field(description="of the epochs, spent on this loss alone")
        weight: Positive

        @model_validator(mode="after")
        def _layers_make_a_flow(self) -> Self:
            if len(self.student_layers) < 2:
                raise ValueError("'student_layers' names at least two layers: the flow is from each to the next one")
            return self

    def __init__(self, parameters: Parameters, shapes: FeatureShapes) -> None:
        super().__init__(parameters, shapes)
        self.first_stage, self.weight = parameters.first_stage, parameters.weight
        self.student_layers, self.teacher_layers = parameters.student_layers, parameters.teacher_layers
        self.connectors = nn.ModuleList()
        for name, student, teacher in shapes.pairs(parameters):
            check_maps(f"of 'fsp', {name}", student, teacher, same_size=False)
            self.connectors.append(nn.Identity() if student[0] == teacher[0] else connector(student, teacher))

    def forward(self, step: Step) -> Tensor:
        names = zip(self.connectors, self.student_layers, strict=True)
        student = [connect(step.student_features[name]) for connect, name in names]
        teacher = [step.teacher_features[name] for name in self.teacher_layers]
        losses = [
            fsp_loss(fsp_matrix(*s), fsp_matrix(*t)) for s, t in zip(pairwise(student), pairwise(teacher), strict=True)
        ]
        return self.weight * torch.stack(losses).mean()


def fsp_matrix(first: Tensor, second: Tensor) -> Tensor:
    """Return products of the channels of two layers, mean over positions (Yim et al., 2017, equation 1).

    Args:
        first: (N, C1, H1, W1).
        second: (N, C2, H2, W2); the larger maps are brought to the size of the smaller ones by the maximum.

    Returns:
        (N, C1, C2).

    Example:
        >>> fsp_matrix(torch.ones(1, 1, 4, 4), torch.full((1, 1, 2, 2), 2.0))
        tensor([[[2.]]])
    """
    height, width = (min(first.shape[axis], second.shape[axis]) for axis in (2, 3))
    first, second = (F.adaptive_max_pool2d(maps, (height, width)) for maps in (first, second))
    return torch.einsum("nihw,njhw->nij", first, second) / (height * width)


def fsp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared error of matrices (N, C1, C2), mean over entries and samples: a scalar, at least 0.

    The paper sums over entries (equation 2). The mean trains with the same rate whatever the widths of the layers.
    """
    return F.mse_loss(student, teacher)
