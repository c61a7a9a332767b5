"""Contrastive representation distillation (Tian et al., 2020)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.errors import ParameterError
from pipeline.core.parameters import Layers, NotNegative, Positive
from pipeline.training.term import FeatureShapes, Step, Term, check_embeddings, embedding

SMALL = 1e-7  # keeps quotients finite, as in the authors' code


class CrdTerm(Term):
    """The contrastive loss of one pair of layers: an image's embedding by the student against the teacher's, and back.

    Both networks' features go through a linear layer each, trained along, to vectors of length 1. Those of all training
    images are remembered, as means over their views. Negatives are drawn among the images of other classes.
    """

    class Parameters(Layers):
        """Parameters of this loss."""

        weight: NotNegative
        negatives: Annotated[int, Field(ge=1)] = Field(description="images of other classes, for each of the batch")
        temperature: Positive = 0.07
        momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.5, description="of the remembered embeddings")
        size: Annotated[int, Field(ge=1)] = Field(128, description="of the embeddings")

    reads_labels = True

    def __init__(self, parameters: Parameters, shapes: FeatureShapes) -> None:
        super().__init__(parameters, shapes)
        self.given = parameters
        if len(parameters.pairs) != 1:
            raise ParameterError(f"layers of 'crd': expected one of each network, got {len(parameters.pairs)}")
        ((self.layers),) = parameters.pairs
        ((name, student, teacher),) = shapes.pairs(parameters)
        check_embeddings(f"of 'crd', {name}", student, teacher)
        self.student, self.teacher = nn.Linear(student[0], parameters.size), nn.Linear(teacher[0], parameters.size)
        self.others = OtherClasses(shapes.labels)
        count = len(shapes.labels)
        for whose in ("student", "teacher"):
            first = F.normalize(torch.randn(count, parameters.size), dim=1)
            self.register_buffer(f"{whose}_memory", first)
            self.register_buffer(f"{whose}_scale", torch.zeros(()))  # 0: not known yet

    def forward(self, step: Step) -> Tensor:
        index, (student_layer, teacher_layer) = step.batch.of_images, self.layers
        student = F.normalize(self.student(embedding(step.student_features[student_layer])), dim=1)
        teacher = F.normalize(self.teacher(embedding(step.teacher_features[teacher_layer])), dim=1)
        chosen = torch.cat([index[:, None], self.others.draw(index, self.given.negatives)], 1)
        loss = self._against("teacher", student, chosen) + self._against("student", teacher, chosen)
        self._remember("student", student, index)
        self._remember("teacher", teacher, index)
        return self.given.weight * loss

    def _against(self, whose: str, embeddings: Tensor, chosen: Tensor) -> Tensor:
        """Return the loss of one network's embeddings (N, size) against what is remembered of the other's."""
        memory, scale = self.get_buffer(f"{whose}_memory"), self.get_buffer(f"{whose}_scale")
        scores = torch.einsum("nkd,nd->nk", memory[chosen], embeddings).div(self.given.temperature).exp()
        with torch.no_grad():
            # The constant that the first batch asks for, kept to the end, as in the authors' code.
            scale.copy_(torch.where(scale > 0, scale, scores.mean() * len(memory)))
        return contrastive_loss(scores / scale, len(memory))

    @torch.no_grad()
    def _remember(self, whose: str, embeddings: Tensor, index: Tensor) -> None:
        memory = self.get_buffer(f"{whose}_memory")
        mean = self.given.momentum * memory[index] + (1 - self.given.momentum) * embeddings
        memory[index] = F.normalize(mean, dim=1)


class OtherClasses(nn.Module):
    """The images of other classes than each image's own, to draw from.

    Args:
        labels: (N,) int64, classes of all training images.

    Raises:
        ParameterError: all are of one class.
    """

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        counts = labels.bincount()
        if (counts == len(labels)).any():
            raise ParameterError("'crd' draws images of other classes, and all training images are of one class")
        self.register_buffer("order", labels.argsort(stable=True), persistent=False)  # by class
        self.register_buffer("begin", (counts.cumsum(0) - counts)[labels], persistent=False)  # of its class
        self.register_buffer("count", counts[labels], persistent=False)

    def draw(self, index: Tensor, number: int) -> Tensor:
        """Return images (N, number), drawn uniformly and with replacement among those of other classes than (N,)."""
        order, begin, count = self.get_buffer("order"), self.get_buffer("begin"), self.get_buffer("count")
        begin, count = begin[index][:, None], count[index][:, None]
        drawn = torch.rand(len(index), number, device=index.device, dtype=torch.float64)
        place = (drawn * (len(order) - count)).long()
        return order[torch.where(place >= begin, place + count, place)]


def contrastive_loss(scores: Tensor, images: int) -> Tensor:
    """Return the loss by which a true pair is told from K drawn ones (Tian et al., 2020, equation 18).

    The mean over the batch of -log h - sum log (1 - h_k), with h = s / (s + K / M).

    Args:
        scores: (N, 1 + K), at least 0: of the true pair, then of the drawn ones.
        images: M, from which they were drawn.

    Returns:
        Scalar, at least 0.

    Example:
        >>> contrastive_loss(torch.tensor([[0.5, 0.5]]), images=2)  # as likely as not: 2 log 2
        tensor(1.3863)
    """
    noise = (scores.shape[1] - 1) / images
    true, drawn = scores[:, 0], scores[:, 1:]
    positive = (true / (true + noise + SMALL)).log()
    negative = (noise / (drawn + noise + SMALL)).log().sum(1)
    return -(positive + negative).mean()
