"""A student against its teacher on one split: accuracy, agreement, and the similarity of their boundaries."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.hdf5 import written_hdf5
from pipeline.core.status import Status
from pipeline.evaluate.similarity import agreement, angle_similarity, magnitude_similarity, teacher_divergence
from pipeline.images.pixels import pixels
from pipeline.images.prepared import Prepared
from pipeline.networks.classifier import Classifier
from pipeline.networks.fast import folded, frozen
from pipeline.networks.predict import accuracy_of, predict
from pipeline.search.boundary import Problem
from pipeline.search.newton import NewtonSearch

# The definition of MagSim and AngSim here, whatever search makes the samples.
MEASURED_BY, TOLERANCE = NewtonSearch(max_gradients=20, quantise=False), 0.02


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


def teacher_side(
    teacher: Classifier, data: Prepared, device: torch.device, batch_size: int, images: int | None = None
) -> TeacherSide:
    """Run the teacher over a split, and its boundary searches over about so many of its images, or all."""
    teacher = frozen(teacher, device)
    logits = predict(teacher, data.images, device)
    labels = torch.from_numpy(data.labels).to(device)
    runner_up = logits.scatter(1, labels[:, None], -torch.inf).argmax(1)
    step = 1 if images is None else max(1, len(labels) // images)
    perturbation = _perturbations(teacher, data, logits, labels, runner_up, batch_size, step)
    return TeacherSide(logits, labels, runner_up, perturbation, step)


def compare(
    student: Classifier, teacher: TeacherSide, data: Prepared, device: torch.device, batch_size: int
) -> Comparison:
    """Compare a student with its teacher on a split.

    Pairs of perturbations are taken from images that both classify correctly, towards the teacher's runner-up; pairs
    in which a search did not converge are left out (NaN).
    """
    student = frozen(student, device)
    logits = predict(student, data.images, device)
    perturbation = _perturbations(student, data, logits, teacher.labels, teacher.runner_up, batch_size, teacher.step)
    return Comparison(
        accuracy=accuracy_of(logits, teacher.labels),
        agreement=float(agreement(logits, teacher.logits)),
        divergence=float(teacher_divergence(logits, teacher.logits)),
        magnitude=magnitude_similarity(perturbation, teacher.perturbation).cpu().numpy(),
        angle=angle_similarity(perturbation, teacher.perturbation).cpu().numpy(),
    )


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
    with h5py.File(path, "r") as file:
        scalars = [float(file[name][()]) for name in ("accuracy", "agreement", "divergence")]
        return Comparison(scalars[0], scalars[1], scalars[2], file["magnitude"][:], file["angle"][:])
