"""Is a network fit for its data: does it match, and is it better than chance?"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import torch

from pipeline.config import Teacher
from pipeline.data import Prepared
from pipeline.errors import WeightsError
from pipeline.models import Architecture, Classifier, placed
from pipeline.prediction import accuracy
from pipeline.storage import file_digest
from pipeline.weights import load_weights, read_architecture

MARGIN_OVER_CHANCE = 0.05  # of the way from chance to 1: below, there is no boundary worth supporting
CLASSES_NAMED = 10  # in messages


def architecture_for(network: str, data: Prepared) -> Architecture:
    """The architecture of a named network for a dataset."""
    return Architecture(network, len(data.class_names), data.image_shape, data.mean, data.std)


def teacher_architecture(teacher: Teacher, data: Prepared) -> Architecture:
    """The architecture of the teacher; it normalises as the parameters say, else as its weights file, else as the data.

    Raises:
        WeightsError: the parameters give another number of channels than the images have.
    """
    architecture = architecture_for(teacher.network, data)
    described = None
    if teacher.weights:
        with contextlib.suppress(WeightsError):  # without a description, or with another program's: not needed
            described = read_architecture(Path(teacher.weights))
    if teacher.mean and teacher.std:
        architecture = architecture._replace(mean=tuple(teacher.mean), std=tuple(teacher.std))
    elif described:
        architecture = architecture._replace(mean=described.mean, std=described.std)
    if len(architecture.mean) != data.image_shape[0]:
        raise WeightsError(
            f"the teacher normalises {len(architecture.mean)} channels, the images have {data.image_shape[0]}: set "
            "teacher.mean and teacher.std, or dataset.channels"
        )
    return architecture


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


def load_with_digest(path: Path, data: Prepared, role: str) -> tuple[Classifier, str]:
    """As `load_for`, and the sha256 of the file.

    Raises:
        WeightsError: as `load_for`; or the file was replaced meanwhile.
    """
    digest = file_digest(path) if path.is_file() else ""
    model = load_for(path, data, role)
    if file_digest(path) != digest:
        raise WeightsError(f"{path}: was replaced while it was read: run again")
    return model, digest


def checked_accuracy(teacher: Classifier, data: Prepared, device: torch.device) -> float:
    """The teacher's accuracy on a split, refused when it is near chance.

    Raises:
        WeightsError: it is hardly better than to name the largest class for every image.
    """
    value = accuracy(placed(teacher, device), data, device)
    chance = float(np.bincount(data.labels).max() / len(data.labels))
    if value < chance + MARGIN_OVER_CHANCE * (1 - chance):
        raise WeightsError(
            f"the teacher classifies {value:.1%} of the images correctly, chance is {chance:.1%}: train it longer, or "
            "check its normalisation and that its classes are in the order of the prepared data: "
            + ", ".join(data.class_names[:CLASSES_NAMED])
            + (", ..." if len(data.class_names) > CLASSES_NAMED else "")
        )
    return value
