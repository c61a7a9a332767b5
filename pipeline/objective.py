"""What a network minimises in training: cross-entropy with the labels, and the losses of a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.batches import Batch
from pipeline.config import Section
from pipeline.errors import ParameterError
from pipeline.models import Classifier
from pipeline.term import FeatureShapes, Step, Term, feature_layers, feature_shapes, recorded


class Moment(NamedTuple):
    """Where in training an epoch is."""

    first_stage: bool
    """In which one loss is minimised alone."""
    epoch: int
    """In its stage, counted from 0."""
    epochs: int
    """Of its stage."""


class Objective:
    """The sum of cross-entropy and terms, in one stage or two.

    Args:
        network: what is trained; terms look at its layers.
        losses: parameters of the terms, by name.
        kinds: the classes of the terms, by name.
        teacher: the teacher itself, where terms look at its layers.

    Raises:
        ParameterError: a layer does not exist, or features cannot be matched.
    """

    def __init__(
        self,
        network: Classifier,
        losses: Mapping[str, Section] | None = None,
        kinds: Mapping[str, type[Term]] | None = None,
        teacher: Classifier | None = None,
    ) -> None:
        losses, kinds = losses or {}, kinds or {}
        self.network, self.teacher = network, teacher
        self.student_layers, self.teacher_layers = feature_layers(losses)
        shapes = FeatureShapes(
            feature_shapes(network, self.student_layers),
            feature_shapes(teacher, self.teacher_layers) if teacher is not None else {},
        )
        self.terms = nn.ModuleDict({name: kinds[name](given, shapes) for name, given in losses.items()})
        self.first_stage = max((term.first_stage for term in self._all()), default=0.0)

    def _all(self) -> list[Term]:
        return [term for term in self.terms.values() if isinstance(term, Term)]

    def moment(self, epoch: int, epochs: int) -> Moment:
        """Where an epoch of the whole training is, counted from 0. Each stage has at least one epoch.

        Raises:
            ParameterError: there are not enough epochs for two stages.
        """
        first = min(max(1, round(self.first_stage * epochs)), epochs - 1) if self.first_stage else 0
        if self.first_stage and not first:
            raise ParameterError("training.epochs: a method with a first stage of its own needs at least 2")
        return Moment(True, epoch, first) if epoch < first else Moment(False, epoch - first, epochs - first)

    def loss(self, student: nn.Module, batch: Batch, moment: Moment) -> Tensor:
        """The loss of a batch; `student` is the network, perhaps wrapped for several devices or another precision."""
        with recorded(self.network, self.student_layers) as student_features:
            logits = student(batch.images)
        step = Step(
            student, batch, logits, student_features, self._of_teacher(batch.images), moment.epoch / moment.epochs
        )
        total = logits.new_zeros(()) if moment.first_stage else F.cross_entropy(logits, batch.labels)
        for term in self._all():
            if bool(term.first_stage) == moment.first_stage:
                total = total + term(step)
        return total

    @torch.no_grad()
    def _of_teacher(self, images: Tensor) -> dict[str, Tensor]:
        if self.teacher is None or not self.teacher_layers:
            return {}
        with recorded(self.teacher, self.teacher_layers) as features:
            self.teacher(images)
        return features
