"""Is a network fit for its data: does it match, and is it better than chance?"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pipeline.core.errors import WeightsError
from pipeline.core.files import file_digest
from pipeline.images.prepared import Prepared
from pipeline.networks.classifier import Classifier
from pipeline.networks.fast import frozen
from pipeline.networks.predict import accuracy
from pipeline.networks.weights import load_weights

MARGIN_OVER_CHANCE = 0.05  # of the way from chance to 1: below, there is no boundary worth supporting
CLASSES_NAMED = 10  # in messages


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


class Loaded(NamedTuple):
    """A network, and the sha256 of the file that it is from."""

    model: Classifier
    digest: str


def load_with_digest(path: Path, data: Prepared, role: str) -> Loaded:
    """Read a network as `load_for` does, with the digest of its file.

    Raises:
        WeightsError: as `load_for`; or the file was replaced meanwhile.
    """
    digest = file_digest(path) if path.is_file() else ""
    model = load_for(path, data, role)
    if file_digest(path) != digest:
        raise WeightsError(f"{path}: was replaced while it was read: run again")
    return Loaded(model, digest)


def checked_accuracy(teacher: Classifier, data: Prepared, device: torch.device) -> float:
    """Return the teacher's accuracy on a split, refused when it is near chance.

    Raises:
        WeightsError: it is hardly better than to name the largest class for every image.
    """
    value = accuracy(frozen(teacher, device), data, device)
    chance = float(np.bincount(data.labels).max() / len(data.labels))
    if value < chance + MARGIN_OVER_CHANCE * (1 - chance):
        raise WeightsError(
            f"the teacher classifies {value:.1%} of the images correctly, chance is {chance:.1%}: train it longer, or "
            "check its normalisation and that its classes are in the order of the prepared data: "
            + ", ".join(data.class_names[:CLASSES_NAMED])
            + (", ..." if len(data.class_names) > CLASSES_NAMED else "")
        )
    return value
