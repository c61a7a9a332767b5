"""Is a network fit for its data: does it match, is it better than chance, are its classes in the data's order?"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.errors import WeightsError
from pipeline.core.extensions import is_own
from pipeline.core.files import file_digest
from pipeline.images.prepared import Prepared
from pipeline.machine.device import one_cpu_thread
from pipeline.networks.classifier import Architecture, Classifier, build
from pipeline.networks.fast import frozen
from pipeline.networks.outputs import probability_problem, random_problem
from pipeline.networks.predict import predict
from pipeline.networks.weights import load_weights

MARGIN_OVER_CHANCE = 0.05  # of the way from chance to 1: below, there is no boundary worth supporting
MARGIN_OF_A_SOUND_TEACHER = 0.5  # likewise: below, something may be wrong with it
CHANCE_LEVEL = 0.01  # probability of an accuracy by chance: above, it is no better than that
TIMES_AS_GOOD = 2  # another order of classes explains errors that makes so many times as many images right
SHARE_OF_A_CIRCLE = 0.75  # of classes that one another's names went round
ORDER_LEVEL = 1e-4  # probability of that by accident: below, it is none
CLASSES_NAMED = 10  # in messages
TRIED = 4  # images that outputs are looked at for


def load_for(path: Path, data: Prepared, role: str) -> Classifier:
    """Read a teacher or student (`role`, for messages) and check that it takes these images and knows these classes.

    Raises:
        WeightsError: the file is unusable, or the network is one for other data.
    """
    model = load_weights(path)
    architecture, classes = model.architecture, len(data.class_names)
    if architecture.classes != classes or architecture.image_shape != data.view_shape:
        raise WeightsError(
            f"{path}: a {role} for images {architecture.image_shape} of {architecture.classes} classes, "
            f"the prepared data has {data.view_shape} and {classes}"
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


class Examined(NamedTuple):
    """How good a teacher is on a split."""

    accuracy: float
    warning: str | None
    """Why little can be expected of it, in one line; None of a sound one."""


def examined(teacher: Classifier, data: Prepared, device: torch.device, trained_here: bool = False) -> Examined:
    """Return a teacher's accuracy on a split, refused when it is near chance or its classes are in another order.

    Chance is to name the largest class for every image. One that was trained here has its classes in their order.

    Raises:
        WeightsError: it gives no logits, or others each time; it is hardly better than chance, or not so surely on so
            few images; or another order of its classes explains what it says.
    """
    network = frozen(teacher, device)
    logits = predict(network, data.centred(), device)
    once, again = (predict(network, data.centred()[:TRIED], device) for _ in range(2))
    if problem := random_problem(once, again) or probability_problem(logits):
        raise WeightsError(f"the teacher ('{teacher.architecture.network}') {problem}")
    predicted = logits.argmax(1).cpu().numpy()
    count, right = len(data.labels), int((predicted == data.labels).sum())
    value, chance = right / count, float(np.bincount(data.labels).max() / count)
    moved = {} if trained_here else moved_classes(predicted, data.labels, len(data.class_names))
    if moved:
        place = np.array([moved.get(number, number) for number in range(len(data.class_names))])
        named = [f"'{data.class_names[to]}' of '{data.class_names[label]}'" for label, to in sorted(moved.items())]
        raise WeightsError(
            f"the teacher's classes are in another order than the prepared data's: it says {_some(named)}, "
            f"{len(moved)} of {len(place)} classes; {value:.1%} of {count} images are right, in its own order "
            f"{(place[data.labels] == predicted).mean():.1%}: write its classes, one a line, into a file, as its "
            "outputs are ordered, and put them right with: python -m stages.teacher convert WEIGHTS --classes FILE "
            "--out NEW"
        )
    if value < chance + MARGIN_OVER_CHANCE * (1 - chance) or _by_accident(right, count, chance) > CHANCE_LEVEL:
        raise WeightsError(
            f"the teacher classifies {value:.1%} of the images correctly, chance is {chance:.1%} ({count} images): "
            "train it longer, or check its normalisation and that its classes are those of the prepared data: "
            f"{_some(data.class_names)}"
        )
    if value < chance + MARGIN_OF_A_SOUND_TEACHER * (1 - chance):
        return Examined(
            value,
            f"the teacher classifies only {value:.1%} of the images correctly ({count} images, chance is "
            f"{chance:.1%}), and searches begin at those alone: check its normalisation (teacher.mean, teacher.std), "
            f"its image size and that its classes are those of the prepared data: {_some(data.class_names)}",
        )
    return Examined(value, None)


def try_out(architecture: Architecture) -> None:
    """Refuse a network of the user that gives no logits, before it is trained.

    Raises:
        WeightsError: it cannot be built; in training or in evaluation, it gives no logits (N, classes), or other ones
            for the same images.
    """
    if not is_own(architecture.network):
        return
    with one_cpu_thread(), torch.random.fork_rng(devices=[]), torch.no_grad():  # forks may follow
        torch.manual_seed(0)
        model, images = build(architecture), torch.rand(TRIED, *architecture.image_shape)
        name, expected = architecture.network, (TRIED, architecture.classes)
        for when in ("training", "evaluation"):
            given = model.train(when == "training")(images)
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            if shape != expected:
                raise WeightsError(f"network '{name}' gives {shape} in {when}, expected logits {expected}, one tensor")
        if problem := random_problem(given, model(images)) or probability_problem(given):
            raise WeightsError(f"network '{name}' {problem}")


def moved_classes(predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> dict[int, int]:
    """Return which classes a network calls by which other one, where that explains its errors; empty where not.

    The best assignment of what it says to the labels is taken on half of each class and judged on the rest, and the
    other way round, so that it cannot fit noise. It explains the errors if at least `TIMES_AS_GOOD` times as many
    images of the classes that it moves are right under it as without, and that is no accident.

    Args:
        predicted: (N,), classes.
        labels: (N,), classes.
        classes: how many there are.
    """
    order = np.argsort(labels, kind="stable")
    parts = order[::2], order[1::2]
    better = worse = 0
    for fitted, judged in (parts, parts[::-1]):
        moved = _assignment(predicted[fitted], labels[fitted], classes)
        for label, to in moved.items():
            said = predicted[judged][labels[judged] == label]
            better += int((said == to).sum())
            worse += int((said == label).sum())
    if better < TIMES_AS_GOOD * worse or _by_accident(better, better + worse, 0.5) > ORDER_LEVEL:
        return {}
    return _assignment(predicted, labels, classes)


def _assignment(predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> dict[int, int]:
    """Return the classes that the best assignment moves, each with the one that it is called by.

    A circle of moved classes counts if most of them are called so more often than by their own names: a network that
    hardly ever says one class and often another has mixed them up, not moved.
    """
    matrix = np.zeros((classes, classes))
    np.add.at(matrix, (labels, predicted), 1)
    if (matrix.diagonal() == matrix.max(1)).all():
        return {}
    from scipy.optimize import linear_sum_assignment  # imported here: slow, and rarely needed

    place = linear_sum_assignment(matrix + np.eye(classes) / 2, maximize=True)[1]  # classes stay where nothing is won
    moved, seen = dict[int, int](), set[int]()
    for start in range(classes):
        circle = list[int]()
        while start not in seen:
            seen.add(start)
            circle.append(start)
            start = int(place[start])
        won = sum(matrix[label, place[label]] > matrix[label, label] for label in circle)
        if len(circle) > 1 and won >= SHARE_OF_A_CIRCLE * len(circle):
            moved |= {label: int(place[label]) for label in circle}
    return moved


def _by_accident(successes: int, trials: int, chance: float) -> float:
    """Return a bound of how likely at least so many successes of independent trials are (Chernoff)."""
    rate = successes / max(trials, 1)
    if rate <= chance:
        return 1.0
    odds = [(rate, chance), (1 - rate, 1 - chance)]
    return exp(-trials * sum(seen * log(seen / expected) for seen, expected in odds if seen))


def _some(names: Sequence[str]) -> str:
    """Return the first names, and that there are more."""
    return ", ".join(names[:CLASSES_NAMED]) + (", ..." if len(names) > CLASSES_NAMED else "")
