"""What a network minimises in training: cross-entropy with the labels, and the losses of a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.errors import ParameterError
from pipeline.core.extensions import find_loss
from pipeline.core.parameters import Section
from pipeline.networks.classifier import Classifier
from pipeline.networks.penultimate import PENULTIMATE
from pipeline.training.batches import Batch, TeacherBatch
from pipeline.training.term import FeatureShapes, Step, Term, feature_layers, feature_shapes, recorded


class Moment(NamedTuple):
    """Where in training an epoch is."""

    first_stage: bool
    """In which one loss is minimised alone."""
    epoch: int
    """In its stage, counted from 0."""
    epochs: int
    """Of its stage."""


class _Stage(NamedTuple):
    """What is minimised in a stage of training, beside cross-entropy in the last one."""

    terms: list[Term]
    student_layers: list[str]
    teacher_layers: list[str]


class Objective:
    """The sum of cross-entropy and terms, in one stage or two.

    Args:
        network: what is trained; terms look at its layers.
        losses: parameters of the terms, by name.
        teacher: the teacher itself, where terms look at its layers.
        stored_features: how many penultimate features of the teacher a batch has, where terms look at these alone.
        cross_entropy: weight of the cross-entropy with the labels.
        smoothing: share of the labels that is spread over all classes (Szegedy et al., 2016).
        labels: (N,) classes of all training images, where terms ask for them.

    Raises:
        ParameterError: a layer does not exist, or features cannot be matched.
    """

    def __init__(
        self,
        network: Classifier,
        losses: Mapping[str, Section] | None = None,
        teacher: Classifier | None = None,
        cross_entropy: float = 1.0,
        smoothing: float = 0.0,
        stored_features: int = 0,
        labels: NDArray[np.int64] | None = None,
    ) -> None:
        losses = losses or {}
        self.network, self.teacher, self.cross_entropy, self.smoothing = network, teacher, cross_entropy, smoothing
        student_layers, teacher_layers = feature_layers(losses.values())
        stored = {PENULTIMATE: torch.Size([stored_features])} if stored_features else {}
        shapes = FeatureShapes(
            feature_shapes(network, student_layers),
            feature_shapes(teacher, teacher_layers) if teacher is not None else stored,
            torch.empty(0, dtype=torch.int64) if labels is None else torch.from_numpy(labels),
        )
        terms: dict[str, Term] = {name: find_loss(name)(given, shapes) for name, given in losses.items()}
        self.terms = nn.ModuleList(terms.values())
        self.first_stage = max((term.first_stage for term in terms.values()), default=0.0)
        self._stages = {}
        for first in (True, False):
            names = [name for name, term in terms.items() if bool(term.first_stage) == first]
            layers = feature_layers(losses[name] for name in names)
            self._stages[first] = _Stage([terms[name] for name in names], *layers)

    def moment(self, epoch: int, epochs: int) -> Moment:
        """Return where an epoch of the whole training is, counted from 0. Each stage has at least one epoch.

        Raises:
            ParameterError: there are not enough epochs for two stages.
        """
        first = min(max(1, round(self.first_stage * epochs)), epochs - 1) if self.first_stage else 0
        if self.first_stage and not first:
            raise ParameterError("training.epochs: a method with a first stage of its own needs at least 2")
        return Moment(True, epoch, first) if epoch < first else Moment(False, epoch - first, epochs - first)

    def loss(self, student: nn.Module, batch: Batch, moment: Moment) -> Tensor:
        """Return the loss of a batch, (S,) of a stack's; `student` may be wrapped for devices or precision."""
        stage = self._stages[moment.first_stage]
        with recorded(self.network, stage.student_layers) as student_features:
            logits = student(batch.images)
        teacher_features = self._of_teacher(batch, stage.teacher_layers)
        progress = moment.epoch / moment.epochs
        step = Step(
            student=student,
            batch=batch,
            logits=logits,
            student_features=student_features,
            teacher_features=teacher_features,
            progress=progress,
        )
        labelled = 0.0 if moment.first_stage else self.cross_entropy
        total = (
            labelled * _cross_entropy(logits, batch.labels, self.smoothing)
            if labelled
            else logits.new_zeros(logits.shape[:-2])
        )
        for term in stage.terms:
            total = total + term(step)
        return total

    @torch.no_grad()
    def _of_teacher(self, batch: Batch, layers: Sequence[str]) -> dict[str, Tensor]:
        if self.teacher is None:
            stored = batch.teacher_features if isinstance(batch, TeacherBatch) else None
            return {} if stored is None else {PENULTIMATE: stored}
        if not layers:
            return {}
        with recorded(self.teacher, layers) as features:
            self.teacher(batch.images)
        return features


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Return the mean cross-entropy (...) of logits (..., N, classes) with labels (..., N)."""
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    flat = logits.flatten(0, -2), labels.flatten()
    losses = F.cross_entropy(*flat, reduction="none", label_smoothing=smoothing)
    return losses.view(labels.shape).mean(-1)
