"""A student against its teacher on one split: accuracy, agreement, and the similarity of their boundaries."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.files import read_hdf5
from pipeline.core.hdf5 import written_hdf5
from pipeline.core.status import Status
from pipeline.evaluate.planes import classes_on_planes
from pipeline.evaluate.similarity import agreement, angle_similarity, magnitude_similarity, teacher_divergence
from pipeline.images.pixels import pixels
from pipeline.images.prepared import Prepared
from pipeline.networks.classifier import Classifier
from pipeline.networks.fast import folded, frozen
from pipeline.networks.predict import accuracy_of, predict
from pipeline.search.boundary import Problem
from pipeline.search.geometry import row_sum
from pipeline.search.newton import NewtonSearch

# The definition of MagSim and AngSim here, whatever search makes the samples.
MEASURED_BY, TOLERANCE = NewtonSearch(max_gradients=20), 0.02
BINS = 15  # of confidence


class TeacherSide(NamedTuple):
    """What the teacher contributes to every comparison; made once."""

    logits: Tensor
    """(N, classes)."""
    labels: Tensor
    """(N,) int64."""
    runner_up: Tensor
    """(N,) int64: the best class but the label, by the teacher."""
    perturbation: Tensor
    """(M, C, H, W) to the teacher's boundary between label and runner-up, of every `step`-th image; NaN where there is
    none."""
    step: int
    radius: float
    """Half of the median distance to that boundary, L2 in pixel space; 0 where none was found."""
    on_planes: NDArray[np.int64]
    """Its classes at points of planes through images of the split."""


class Comparison(NamedTuple):
    """A student beside its teacher."""

    accuracy: float
    agreement: float
    divergence: float
    """KL(teacher || student), nats."""
    magnitude: NDArray[np.float64]
    """(M,) magnitude similarity per image that was compared, NaN where left out."""
    angle: NDArray[np.float64]
    """(M,) angle similarity per image that was compared, NaN where left out."""
    calibration_error: float
    """Mean difference of confidence and accuracy over 15 bins of confidence (Guo et al., 2017)."""
    distance: float
    """Median L2 distance in pixel space to the student's own boundary with its own runner-up, of images that it
    classifies correctly; NaN where none was found."""
    robust_accuracy: float
    """Fraction of the images that are compared which the student classifies correctly, and its own search does not lead
    to its boundary within the teacher's `radius`: an upper bound of its accuracy under perturbations of that length."""
    plane_agreement: float
    """Fraction of points of planes through images at which student and teacher predict the same class."""


def teacher_side(
    teacher: Classifier, data: Prepared, device: torch.device, batch_size: int, images: int | None = None
) -> TeacherSide:
    """Run the teacher over a split, and its boundary searches over about so many of its images, or all."""
    teacher = frozen(teacher, device)
    logits = predict(teacher, data.images, device)
    labels = torch.from_numpy(data.labels).to(device)
    runner_up = _runner_up(logits, labels)
    step = 1 if images is None else max(1, len(labels) // images)
    perturbation = _perturbations(teacher, data, logits, labels, runner_up, batch_size, step)
    return TeacherSide(
        logits=logits,
        labels=labels,
        runner_up=runner_up,
        perturbation=perturbation,
        step=step,
        radius=float(_lengths(perturbation).nanmedian().nan_to_num() / 2),
        on_planes=classes_on_planes(teacher, data.images),
    )


def compare(
    student: Classifier, teacher: TeacherSide, data: Prepared, device: torch.device, batch_size: int
) -> Comparison:
    """Compare a student with its teacher on a split.

    Pairs of perturbations are taken from images that both classify correctly, towards the teacher's runner-up; pairs
    in which a search did not converge are left out (NaN). The student's own distance is towards its own runner-up.
    """
    student = frozen(student, device)
    logits = predict(student, data.images, device)
    labels, step = teacher.labels, teacher.step
    perturbation = _perturbations(student, data, logits, labels, teacher.runner_up, batch_size, step)
    own = _perturbations(student, data, logits, labels, _runner_up(logits, labels), batch_size, step)
    distance, correct = _lengths(own), (logits.argmax(1) == labels)[::step]
    on_planes = classes_on_planes(student, data.images)
    return Comparison(
        accuracy=accuracy_of(logits, teacher.labels),
        agreement=float(agreement(logits, teacher.logits)),
        divergence=float(teacher_divergence(logits, teacher.logits)),
        magnitude=magnitude_similarity(perturbation, teacher.perturbation).cpu().numpy(),
        angle=angle_similarity(perturbation, teacher.perturbation).cpu().numpy(),
        calibration_error=_calibration_error(logits, labels),
        distance=float(distance.nanmedian()),
        robust_accuracy=float((correct & ~(distance <= teacher.radius)).double().mean()),
        plane_agreement=float((on_planes == teacher.on_planes).mean()),
    )


def _runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the best class but the label (N,) of logits (N, classes)."""
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def _lengths(perturbations: Tensor) -> Tensor:
    """Return the L2 norms (M,) of perturbations, NaN where there is none."""
    return row_sum(perturbations.square()).sqrt()


def _calibration_error(logits: Tensor, labels: Tensor) -> float:
    from torchmetrics.functional.classification import multiclass_calibration_error  # imported here: slow

    return float(multiclass_calibration_error(logits.softmax(1), labels, logits.shape[1], BINS, validate_args=False))


def _perturbations(
    model: Classifier, data: Prepared, logits: Tensor, base: Tensor, target: Tensor, batch_size: int, step: int
) -> Tensor:
    """Return perturbations (M, C, H, W) to a model's own boundary, NaN where it is wrong or nothing was found."""
    images = pixels(torch.from_numpy(np.ascontiguousarray(data.images[::step])).to(logits.device))
    logits, base, target = logits[::step], base[::step], target[::step]
    rows = (logits.argmax(1) == base).nonzero().squeeze(1)
    result = torch.full_like(images, torch.nan)
    if len(rows):
        found = MEASURED_BY(
            Problem(
                images=images[rows],
                base=base[rows],
                target=target[rows],
                logits=logits[rows],
                reference=model,
                fast=folded(model),
                tolerance=TOLERANCE,
                levels=None,
                batch_size=batch_size,
            )
        )
        converged = found.status == Status.CONVERGED
        result[rows[converged]] = found.perturbation[converged]
    return result


def common_pairs(comparisons: Iterable[Comparison]) -> NDArray[np.bool_]:
    """Return (M,) images whose pair of perturbations is defined for every student: weak students get no easier ones."""
    magnitudes = np.stack([comparison.magnitude for comparison in comparisons])
    return np.asarray(np.isfinite(magnitudes).all(axis=0))


def figures_of(comparison: Comparison, common: NDArray[np.bool_]) -> dict[str, float | int | None]:
    """Return the figures of one student: fractions, nats and similarities; None where no pair is left for a mean."""
    own = np.isfinite(comparison.magnitude)

    def mean(values: NDArray[np.float64], pairs: NDArray[np.bool_]) -> float | None:
        return float(values[pairs].mean()) if pairs.any() else None

    return {
        "accuracy": comparison.accuracy,
        "agreement": comparison.agreement,
        "teacher_divergence": comparison.divergence,
        "calibration_error": comparison.calibration_error,
        "distance": None if np.isnan(comparison.distance) else comparison.distance,
        "robust_accuracy": comparison.robust_accuracy,
        "plane_agreement": comparison.plane_agreement,
        "mag_sim": mean(comparison.magnitude, own),
        "ang_sim": mean(comparison.angle, own),
        "pairs": int(own.sum()),
        "pairs_left_out": int((~own).sum()),
        "mag_sim_common": mean(comparison.magnitude, common),
        "ang_sim_common": mean(comparison.angle, common),
        "pairs_common": int(common.sum()),
    }


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write a comparison to an HDF5 file, atomically."""
    with written_hdf5(path) as file:
        for name, value in comparison._asdict().items():
            file[name] = value


def read_comparison(path: Path) -> Comparison:
    """Read what `write_comparison` wrote."""
    with read_hdf5(path) as file:
        values: dict[str, Any] = {name: file[name][()] for name in Comparison._fields}
    return Comparison(**{name: value if value.ndim else value.item() for name, value in values.items()})
