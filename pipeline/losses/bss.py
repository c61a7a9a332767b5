"""Softened outputs of the teacher on boundary-supporting samples (Heo et al., 2019)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.core.parameters import NotNegative, Positive, Section
from pipeline.core.status import Status
from pipeline.images.pixels import pixels
from pipeline.losses.hinton import softened_cross_entropy
from pipeline.training.batches import BoundaryBatch, BoundarySamples
from pipeline.training.term import FeatureShapes, Step, Term


class BssTerm(Term):
    """The mean softened cross-entropy on one sample each of the base samples that are chosen in the batch."""

    class Parameters(Section):
        """Parameters of this loss."""

        temperature: Positive
        start: NotNegative = Field(description="weight at the start of training")
        zero_at: Annotated[float, Field(gt=0, le=1)] = Field(
            description="progress of training at which the weight is 0"
        )
        fraction: Annotated[float, Field(gt=0, le=1)] = Field(description="of the batch, at most, in this loss")
        moves_statistics: bool = Field(description="the samples move batch norm's running statistics")
        converged_only: bool = Field(description="leave out samples that are not on the boundary")

    takes_stacks = True

    def __init__(self, parameters: Parameters, shapes: FeatureShapes) -> None:
        super().__init__(parameters, shapes)
        self.given = parameters
        self.loss = BoundaryLoss(parameters.temperature, parameters.fraction, parameters.moves_statistics)

    @classmethod
    def statuses(cls, parameters: Parameters) -> tuple[Status, ...]:
        """Return how the searches of the samples that it uses may have ended."""
        on_boundary = (Status.CONVERGED,)
        return on_boundary if parameters.converged_only else (*on_boundary, Status.NOT_CONVERGED, Status.THIRD_CLASS)

    def forward(self, step: Step) -> Tensor:
        beta = boundary_weight(step.progress, self.given.start, self.given.zero_at)
        if beta == 0:
            return step.logits.new_zeros(step.logits.shape[:-2])
        return beta * self.loss.of_batch(step.student, step.logits, step.boundary_batch)


class BoundaryLoss(nn.Module):
    """The mean softened cross-entropy on boundary-supporting samples, for any training loop (Heo et al., 2019).

    Of a batch, the rows are taken that teacher and student both classify correctly and whose probabilities of the other
    classes differ most; the student sees the sample of each. The host never waits for the device.

    Args:
        temperature: T of the softened outputs, above 0.
        fraction: of the batch, at most, in the loss, in (0, 1].
        moves_statistics: the samples move batch norm's running statistics.

    Example:
        >>> student = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
        >>> rows = {
        ...     "image": torch.tensor([[[[255, 0]]]], dtype=torch.uint8),
        ...     "label": torch.tensor([0]),
        ...     "teacher_logits": torch.tensor([[3.0, 0.0]]),
        ...     "samples": torch.tensor([[[[[0.5, 0.5]]]]]),
        ...     "boundary_logits": torch.tensor([[[0.0, 0.0]]]),
        ...     "status": torch.tensor([[0]], dtype=torch.uint8),
        ... }
        >>> _ = student[1].weight.data.copy_(torch.eye(2))
        >>> BoundaryLoss()(student, student(pixels(rows["image"])), rows)
        tensor(0.6931, grad_fn=<DivBackward0>)
    """

    def __init__(self, temperature: float = 3.0, fraction: float = 0.25, moves_statistics: bool = True) -> None:
        super().__init__()
        self.temperature, self.fraction, self.moves_statistics = temperature, fraction, moves_statistics

    def forward(self, student: nn.Module, logits: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a batch, without a weight.

        Args:
            student: the network, from pixels in [0, 1] to logits; it is called on the samples.
            logits: (N, classes) of the student on the images of the rows.
            rows: N rows of `BoundaryShards` with embedded images, by column, on the student's device. Of several target
                classes, the first one that converged counts.

        Returns:
            Scalar, 0 where no row qualifies.
        """
        stored = _StoredRows(rows)
        batch = BoundaryBatch(
            images=stored.images,
            labels=rows["label"],
            teacher_logits=rows["teacher_logits"],
            usable=stored.converged.any(1),
            boundary=stored,
        )
        return self.of_batch(student, logits, batch)

    def of_batch(self, student: nn.Module, logits: Tensor, batch: BoundaryBatch) -> Tensor:
        """Return the loss of a batch of the pipeline's own sources."""
        rows = batch.labels.shape[-1]
        count = max(1, int(self.fraction * rows))
        chosen = select_base_samples(logits.detach(), batch.teacher_logits, batch.labels, batch.usable, count)
        if count == 1 and rows > 1:  # batch norm cannot train on one sample alone: a filler comes along
            chosen = Selection(torch.cat([chosen.rows, (chosen.rows + 1) % rows], -1), F.pad(chosen.weights, (0, 1)))
        found = batch.boundary.samples_of(chosen.rows)
        with nullcontext() if self.moves_statistics else running_statistics_kept(student):
            losses = softened_cross_entropy(student(found.samples), found.teacher_logits, self.temperature)
        return mean_over_selected(losses, chosen.weights * found.usable)


class _StoredRows:
    """The samples of rows of `BoundaryShards`."""

    def __init__(self, rows: Mapping[str, Tensor]) -> None:
        self.rows, self.images = rows, pixels(rows["image"])
        self.converged = rows["status"] == Status.CONVERGED
        self.choice = self.converged.int().argmax(1)

    def samples_of(self, rows: Tensor) -> BoundarySamples:
        at = (rows, self.choice[rows])
        usable = self.converged[at]
        # Fillers go through the network too: with their image and its logits, which are finite.
        return BoundarySamples(
            samples=torch.where(usable[:, None, None, None], self.rows["samples"][at], self.images[rows]),
            teacher_logits=torch.where(
                usable[:, None], self.rows["boundary_logits"][at], self.rows["teacher_logits"][rows]
            ),
            usable=usable,
        )


class Selection(NamedTuple):
    """Rows of a batch chosen for the boundary loss: a fixed count, where fillers have weight 0."""

    rows: Tensor
    """(..., M) int64, distinct rows of the batch."""
    weights: Tensor
    """(..., M) float32, 1 for a chosen row, 0 for a filler."""


def select_base_samples(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, usable: Tensor, count: int
) -> Selection:
    """Choose the base samples of the boundary loss (Heo et al., 2019).

    Candidates are the samples that teacher and student both classify correctly; of these, the ones are taken whose
    probabilities of the other classes differ most, by squared difference. The count is fixed so that the host never
    waits for the device.

    Args:
        student_logits: (..., N, classes), current.
        teacher_logits: (..., N, classes).
        labels: (..., N) int64.
        usable: (..., N) bool, samples that have a boundary-supporting sample.
        count: M, at most N.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0], [1, 0], [0, 1]]), torch.tensor([[1.0, 0], [3, 0], [1, 0]])
        >>> labels, usable = torch.tensor([0, 0, 0]), torch.tensor([True, True, True])
        >>> select_base_samples(student, teacher, labels, usable, count=2).rows  # the student misclassifies row 2
        tensor([1, 0])
    """
    student, teacher = F.softmax(student_logits, -1), F.softmax(teacher_logits, -1)
    difference = (student - teacher).square()
    score = difference.sum(-1) - difference.gather(-1, labels[..., None]).squeeze(-1)
    candidate = (student_logits.argmax(-1) == labels) & (teacher_logits.argmax(-1) == labels) & usable
    top = torch.where(candidate, score, -1.0).topk(count)
    return Selection(top.indices, (top.values >= 0).to(student_logits.dtype))


def mean_over_selected(losses: Tensor, weights: Tensor) -> Tensor:
    """Return the mean (...) of losses (..., M) over rows of weight 1; 0 where none is chosen."""
    return torch.where(weights > 0, losses * weights, 0).sum(-1) / weights.sum(-1).clamp(min=1)


def boundary_weight(progress: float, start: float, zero_at: float) -> float:
    """Return beta(e): from `start` down to 0 at the fraction `zero_at` of training, and 0 from there on.

    Example:
        >>> boundary_weight(0.375, start=2.0, zero_at=0.75), boundary_weight(0.9, start=2.0, zero_at=0.75)
        (1.0, 0.0)
    """
    return max(0.0, start * (1 - progress / zero_at))


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Keep batch norm's running statistics; in training it still normalises by the batch."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
