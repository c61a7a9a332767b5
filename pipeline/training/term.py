"""What a loss of distillation is given, and what it is: one term of the sum that a student minimises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.core.errors import ParameterError
from pipeline.core.extensions import find_loss
from pipeline.core.parameters import Layers, Section
from pipeline.core.status import Status
from pipeline.networks.classifier import Classifier
from pipeline.networks.penultimate import PENULTIMATE, last_linear
from pipeline.training.batches import Batch, BoundaryBatch, TeacherBatch

LAYERS_NAMED = 30  # in messages

Features = Mapping[str, Tensor]
"""Outputs of layers, by the layers' names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One batch, after the passes that all losses share."""

    student: nn.Module
    """For further passes."""
    batch: Batch
    logits: Tensor
    """(N, classes) float32, of the student on the images; (S, N, classes) of a stack."""
    student_features: Features
    teacher_features: Features
    """float32, on the images, without gradients."""
    progress: float
    """e / E of the stage of training, in [0, 1)."""

    @property
    def teacher_batch(self) -> TeacherBatch:
        """The batch, of a source that knows the teacher's logits."""
        if not isinstance(self.batch, TeacherBatch):
            raise TypeError("the source of this method gives no logits of a teacher")
        return self.batch

    @property
    def boundary_batch(self) -> BoundaryBatch:
        """The batch, of a source that was asked for boundary-supporting samples: see `Term.statuses`."""
        if not isinstance(self.batch, BoundaryBatch):
            raise TypeError("the source of this method gives no boundary-supporting samples")
        return self.batch


class FeatureShapes(NamedTuple):
    """Shapes of the outputs of layers for one image, by the layers' names: as (16, 32, 32)."""

    student: Mapping[str, torch.Size]
    teacher: Mapping[str, torch.Size]
    labels: Tensor = torch.empty(0, dtype=torch.int64)
    """(N,) int64, classes of all training images, for a term that asks for them."""

    def pairs(self, layers: Layers) -> Iterator[tuple[str, torch.Size, torch.Size]]:
        """Yield each pair of layers that is compared: how to name it, the student's shape, the teacher's."""
        for student, teacher in layers.pairs:
            yield f"'{student}' to '{teacher}'", self.student[student], self.teacher[teacher]


class Term(nn.Module):
    """A loss beside cross-entropy. It may have weights of its own, which are trained along and then dropped.

    A subclass is a loss of its own: `Parameters` is its section of a method in params.yaml, `forward` its value.

    Args:
        parameters: its section of the method.
        shapes: of the layers that it names, where its parameters are derived from `Layers`.
    """

    Parameters: ClassVar[type[Section]]

    first_stage = 0.0
    """Fraction of the epochs in which this term alone is minimised; afterwards it is not used."""

    def __init__(self, parameters: Any, shapes: FeatureShapes) -> None:
        super().__init__()

    reads_labels = False
    """It knows the classes of all training images, and which of them a batch has."""

    takes_stacks = False
    """It can be had of S students at once: `Step` has a dimension more in front, and so has the value."""

    @classmethod
    def statuses(cls, parameters: Any) -> tuple[Status, ...]:
        """Return how the searches of the boundary-supporting samples that it uses may have ended; none by default."""
        return ()

    def forward(self, step: Step) -> Tensor:
        """Return the value with its weight: a scalar, or (S,) of a stack."""
        raise NotImplementedError


def statuses_of(losses: Mapping[str, Section]) -> tuple[Status, ...]:
    """Return how the searches of the samples that losses use may have ended; none if they use no samples.

    Raises:
        ParameterError: two losses want samples of different kinds.
    """
    wanted = {name: find_loss(name).statuses(parameters) for name, parameters in losses.items()}
    some = {name: statuses for name, statuses in wanted.items() if statuses}
    if len({frozenset(statuses) for statuses in some.values()}) > 1:
        raise ParameterError(f"losses {', '.join(some)}: use samples of different statuses, take one of them")
    return next(iter(some.values()), ())


def feature_layers(losses: Iterable[Section]) -> tuple[list[str], list[str]]:
    """Return the layers of the student and of the teacher that losses with these parameters look at."""
    groups = [loss for loss in losses if isinstance(loss, Layers)]
    student = [layer for group in groups for layer in group.student_layers]
    teacher = [layer for group in groups for layer in group.teacher_layers]
    return list(dict.fromkeys(student)), list(dict.fromkeys(teacher))


@contextmanager
def recorded(classifier: Classifier, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield the outputs (N, ...) float32 of named layers in the passes of a network within the block, of the last pass.

    `penultimate` stands for the input (N, D) of the last linear layer.

    Raises:
        ParameterError: the network has no such layer, or its output is not one tensor.
    """
    modules, outputs = dict(classifier.network.named_modules()), dict[str, Tensor]()
    network = classifier.architecture.network

    def keep(name: str, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise ParameterError(f"layer '{name}' of '{network}' gives no tensor: name another one")
        outputs[name] = output.float().clone()  # what comes after may work in place

    handles = []
    try:
        for name in layers:
            if name == PENULTIMATE:
                layer = last_linear(classifier)
                handles.append(layer.register_forward_pre_hook(lambda _, inputs: keep(PENULTIMATE, inputs[0])))
                continue
            if name not in modules or not name:
                known = [known for known in modules if known][:LAYERS_NAMED]
                raise ParameterError(f"network '{network}' has no layer '{name}', expected one of: {', '.join(known)}")
            hook = modules[name].register_forward_hook(lambda _, __, output, name=name: keep(name, output))
            handles.append(hook)
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def feature_shapes(classifier: Classifier, layers: Sequence[str]) -> dict[str, torch.Size]:
    """Return shapes of the outputs of named layers for one image; errors are those of `recorded`."""
    if not layers:
        return {}
    training, image = classifier.training, torch.zeros(1, *classifier.architecture.image_shape)
    try:
        with recorded(classifier.eval(), layers) as outputs:
            classifier(image.to(classifier.mean.device))
    finally:
        classifier.train(training)
    for name in layers:
        if name not in outputs:
            raise ParameterError(f"layer '{name}' of '{classifier.architecture.network}' takes no part: name another")
    return {name: output.shape[1:] for name, output in outputs.items()}


def check_maps(name: str, student: torch.Size, teacher: torch.Size, same_size: bool) -> None:
    """Refuse layers whose outputs are not maps (C, H, W), or whose maps are not of one size where they must be.

    Raises:
        ParameterError: it names the layers, their shapes, and what to do.
    """
    if len(student) != 3 or len(teacher) != 3:
        wanted = "name layers whose outputs are maps (channels, height, width)"
    elif same_size and student[1:] != teacher[1:]:
        wanted = "name layers whose maps have the same height and width"
    else:
        return
    raise ParameterError(f"layers {name}: the shapes {tuple(student)} and {tuple(teacher)} cannot be matched; {wanted}")


def check_embeddings(name: str, student: torch.Size, teacher: torch.Size) -> None:
    """Refuse layers whose outputs are neither vectors (C) nor maps (C, H, W), of which `embedding` makes vectors.

    Raises:
        ParameterError: it names the layers, their shapes, and what to do.
    """
    if not {len(student), len(teacher)} <= {1, 3}:
        raise ParameterError(
            f"layers {name}: the shapes {tuple(student)} and {tuple(teacher)} are no embeddings; name layers whose "
            "outputs are vectors (channels) or maps (channels, height, width)"
        )


def embedding(features: Tensor) -> Tensor:
    """Return (N, C) of vectors (N, C), or of maps (N, C, H, W) by the mean over positions."""
    return features.mean((2, 3)) if features.ndim > 2 else features


def connector(student: torch.Size, teacher: torch.Size) -> nn.Module:
    """Return a 1x1 convolution, to be trained along, from the student's channels to the teacher's."""
    return nn.Conv2d(student[0], teacher[0], 1)
