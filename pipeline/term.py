"""What a loss of distillation is given, and what it is: one term of the sum that a student minimises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.batches import Batch
from pipeline.config import Layers, Section
from pipeline.errors import ParameterError
from pipeline.models import Classifier

LAYERS_NAMED = 30  # in messages

Features = Mapping[str, Tensor]
"""Outputs of layers, by the layers' names."""


class Step(NamedTuple):
    """One batch, after the passes that all losses share."""

    student: nn.Module
    """For further passes."""
    batch: Batch
    logits: Tensor
    """(N, classes) float32, of the student on the images."""
    student_features: Features
    teacher_features: Features
    """float32, on the images, without gradients."""
    progress: float
    """e / E of the stage of training, in [0, 1)."""


class FeatureShapes(NamedTuple):
    """Shapes of the outputs of layers for one image, by the layers' names: as (16, 32, 32)."""

    student: Mapping[str, torch.Size]
    teacher: Mapping[str, torch.Size]

    def pairs(self, layers: Layers) -> Iterator[tuple[str, torch.Size, torch.Size]]:
        """Each pair of layers that is compared: how to name it, the student's shape, the teacher's."""
        for student, teacher in layers.pairs:
            yield f"'{student}' to '{teacher}'", self.student[student], self.teacher[teacher]


class Term(nn.Module):
    """A loss beside cross-entropy. It may have weights of its own, which are trained along and then dropped.

    Args:
        parameters: its section of the method.
        shapes: of the layers that it names, where it is one that compares features.
    """

    first_stage = 0.0
    """Fraction of the epochs in which this term alone is minimised; afterwards it is not used."""

    def __init__(self, parameters: Any, shapes: FeatureShapes) -> None:
        super().__init__()

    def forward(self, step: Step) -> Tensor:
        """A scalar, with its weight."""
        raise NotImplementedError


def feature_layers(losses: Iterable[Section]) -> tuple[list[str], list[str]]:
    """The layers of the student and of the teacher that losses with these parameters look at."""
    groups = [loss for loss in losses if isinstance(loss, Layers)]
    student = [layer for group in groups for layer in group.student_layers]
    teacher = [layer for group in groups for layer in group.teacher_layers]
    return list(dict.fromkeys(student)), list(dict.fromkeys(teacher))


@contextmanager
def recorded(classifier: Classifier, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs (N, ...) float32 of named layers in the passes of a network within the block, of the last pass.

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
    """Shapes of the outputs of named layers for one image; errors are those of `recorded`."""
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


def connector(student: torch.Size, teacher: torch.Size) -> nn.Module:
    """From the student's channels to the teacher's: a 1x1 convolution to be trained along."""
    return nn.Conv2d(student[0], teacher[0], 1)
