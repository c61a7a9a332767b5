"""Is a network fit for its data: does it match, and is it better than chance?"""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.data import Prepared
from pipeline.errors import WeightsError
from pipeline.models import Architecture, Classifier, load_weights
from pipeline.prediction import accuracy

WORST_TEACHER = 1.5  # times chance: below this accuracy there is no boundary worth supporting


def architecture_for(network: str, data: Prepared) -> Architecture:
    """The architecture of a named network for a dataset."""
    return Architecture(network, len(data.class_names), data.image_shape, data.mean, data.std)


def load_for(path: Path, data: Prepared, role: str) -> Classifier:
    """Read a teacher or student (`role`, for messages) and check that it takes these images and knows these classes.

    Raises:
        WeightsError: the file is unusable, or the network is one for other data.
    """
    model = load_weights(path)
    architecture, classes = model.architecture, len(data.class_names)
    if architecture.classes != classes or architecture.image_shape != data.image_shape:
        raise WeightsError(
            f"{path}: a {role} for images {architecture.image_shape} of {architecture.classes} classes, "
            f"the prepared data has {data.image_shape} and {classes}"
        )
    return model


def checked_accuracy(teacher: Classifier, data: Prepared, device: torch.device) -> float:
    """The teacher's accuracy on a split, refused when it is near chance.

    Raises:
        WeightsError: the accuracy is less than 1.5 times chance.
    """
    value = accuracy(teacher.to(device), data, device)
    chance = 1 / len(data.class_names)
    if value < WORST_TEACHER * chance:
        raise WeightsError(
            f"the teacher classifies {value:.1%} of the images correctly, chance is {chance:.1%}: train it longer, or "
            "check that its classes are in the order of the prepared data"
        )
    return value
