"""How good a network is class by class, and on which images students and teacher disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.extensions import own_modules
from pipeline.core.files import file_digest, read_hdf5
from pipeline.core.hdf5 import written_hdf5
from pipeline.core.provenance import code_digest, fingerprint
from pipeline.core.store import Store
from pipeline.images.prepared import Prepared
from pipeline.machine.device import one_cpu_thread
from pipeline.networks.classifier import Classifier
from pipeline.networks.fast import frozen
from pipeline.networks.loading import Loaded, load_for
from pipeline.networks.predict import predict
from pipeline.networks.weights import read_architecture

MOST_SHOWN = 16  # images on which networks disagree


class Quality(NamedTuple):
    """A network on a split, class by class and image by image."""

    balanced_accuracy: float
    """Mean of the accuracies of the classes that the split has."""
    macro_f1: float
    """Mean of the F1 scores of the classes that the split has."""
    confusion: NDArray[np.int64]
    """(classes, classes): images of a class (row) by predicted class (column)."""
    predicted: NDArray[np.int64]
    """(N,) the class of each image."""
    confidence: NDArray[np.float64]
    """(N,) its probability."""
    divergence: NDArray[np.float64]
    """(N,) KL(teacher || network), nats."""

    def means(self) -> dict[str, float]:
        """Return the means over classes by name."""
        return {"balanced_accuracy": self.balanced_accuracy, "macro_f1": self.macro_f1}


def quality(logits: Tensor, teacher_logits: Tensor, labels: NDArray[np.int64]) -> Quality:
    """Return the quality of a network by its logits and the teacher's, both (N, classes), and labels (N,)."""
    from sklearn.metrics import confusion_matrix, f1_score, recall_score  # imported here: slow

    ours, teachers = (each.cpu().double().log_softmax(1) for each in (logits, teacher_logits))
    top = ours.max(1)
    predicted = top.indices.numpy()
    means: dict[str, Any] = {"labels": np.unique(labels), "average": "macro", "zero_division": 0}
    return Quality(
        balanced_accuracy=float(recall_score(labels, predicted, **means)),
        macro_f1=float(f1_score(labels, predicted, **means)),
        confusion=confusion_matrix(labels, predicted, labels=range(logits.shape[1])),
        predicted=predicted,
        confidence=top.values.exp().numpy(),
        divergence=F.kl_div(ours, teachers, log_target=True, reduction="none").sum(1).numpy(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Qualities:
    """Qualities of networks beside one teacher on one split: finished ones are kept by fingerprint."""

    teacher: Loaded
    test: Prepared
    """The split."""
    device: torch.device
    """Where to compute."""
    store: Store
    """Where finished ones are kept."""

    @one_cpu_thread()  # so that results do not depend on how many there are
    def of_all(self, networks: Sequence[Path]) -> dict[Path, Quality]:
        """Return the quality of the network of each weights file, which may be the teacher's own."""
        names = {weights: self._key(weights) for weights in networks}
        missing = [weights for weights, name in names.items() if self.store.find(name) is None]
        if missing:
            teacher_logits = self._logits(self.teacher.model)
        for weights in missing:
            logits = self._logits(load_for(weights, self.test, "student"))
            found = quality(logits, teacher_logits, self.test.labels)
            _write(self.store.path(names[weights]), found)
            self.store.seal(names[weights])
        return {weights: Quality(**_read(self.store.path(name))) for weights, name in names.items()}

    def _logits(self, model: Classifier) -> Tensor:
        return predict(frozen(model, self.device), self.test.images, self.device)

    def _key(self, weights: Path) -> str:
        described = read_architecture(weights)
        own = own_modules(described.network if described else "", self.teacher.model.architecture.network)
        code = code_digest("pipeline.evaluate.quality", "pipeline.machine.device", *dict.fromkeys(own))
        return f"{fingerprint(file_digest(weights), self.teacher.digest, self.test.digest, code)}/quality.h5"


class Disagreements(NamedTuple):
    """The images of a split on which students differ most from their teacher, at most `MOST_SHOWN`."""

    image: NDArray[np.uint8]
    """(n, C, H, W)."""
    label: NDArray[np.int64]
    """(n,)."""
    teacher: NDArray[np.int64]
    """(n,) the teacher's class."""
    confidence: NDArray[np.float64]
    """(n,) its probability."""
    student: NDArray[np.int64]
    """(n,) the class that most of the students predict, of those that are not the teacher's."""
    runs: NDArray[np.int64]
    """(n,) how many of them do."""
    divergence: NDArray[np.float64]
    """(n,) KL(teacher || student), nats, mean over the students; they come in its order."""


def disagreements(test: Prepared, teacher: Quality, students: Sequence[Quality]) -> Disagreements:
    """Return the images of the largest mean divergence, of those where a student's class is not the teacher's."""
    predicted = np.stack([each.predicted for each in students])
    divergence = np.mean([each.divergence for each in students], axis=0)
    (rows,) = np.nonzero((predicted != teacher.predicted).any(0))
    rows = rows[np.argsort(-divergence[rows], kind="stable")][:MOST_SHOWN]
    votes = np.zeros((len(rows), len(test.class_names)), np.int64)
    for place, row in enumerate(rows):
        votes[place] = np.bincount(predicted[:, row], minlength=len(test.class_names))
        votes[place, teacher.predicted[row]] = 0
    return Disagreements(
        image=np.ascontiguousarray(test.images[rows]),
        label=test.labels[rows],
        teacher=teacher.predicted[rows],
        confidence=teacher.confidence[rows],
        student=votes.argmax(1),
        runs=votes.max(1, initial=0),
        divergence=divergence[rows],
    )


def write_disagreements(path: Path, found: Disagreements) -> None:
    """Write what `disagreements` found to an HDF5 file, atomically."""
    _write(path, found)


def read_disagreements(path: Path) -> Disagreements:
    """Read what `write_disagreements` wrote."""
    return Disagreements(**_read(path))


def _write(path: Path, values: Quality | Disagreements) -> None:
    with written_hdf5(path) as file:
        for name, value in values._asdict().items():
            file[name] = value


def _read(path: Path) -> dict[str, Any]:
    with read_hdf5(path) as file:
        values = {name: file[name][()] for name in file}
    return {name: value if value.ndim else value.item() for name, value in values.items()}
