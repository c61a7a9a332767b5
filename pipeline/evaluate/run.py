"""Comparing many students with their teacher: finished comparisons are kept by fingerprint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.core.extensions import own_modules
from pipeline.core.files import file_digest
from pipeline.core.parameters import Runtime
from pipeline.core.provenance import code_digest, fingerprint
from pipeline.core.store import Store
from pipeline.evaluate.compare import (
    Comparison,
    TeacherSide,
    common_pairs,
    compare,
    figures_of,
    read_comparison,
    teacher_side,
    write_comparison,
)
from pipeline.images.prepared import Prepared
from pipeline.machine.device import one_cpu_thread, search_batch, side_by_side
from pipeline.machine.forks import run_in_forks
from pipeline.networks.fast import frozen
from pipeline.networks.loading import Loaded, load_with_digest
from pipeline.networks.predict import accuracy
from pipeline.networks.weights import read_architecture

# The modules that decide a comparison: an edit to one of them makes finished ones invalid.
CODE = ("pipeline.evaluate.compare", "pipeline.machine.device")


def comparison_code(*networks: str) -> str:
    """Return the digest of the code that decides a comparison of these networks, by name."""
    return code_digest(*CODE, *dict.fromkeys(own_modules(*networks)), alone=("pipeline.evaluate.run",))


class Compared(NamedTuple):
    """Students beside their teacher."""

    comparisons: dict[Path, Comparison]
    """By weights file."""
    common: NDArray[np.bool_]
    """(M,) images whose pair of perturbations all of them have."""
    made: int
    """Comparisons that were not finished before."""

    def figures(self, weights: Path) -> dict[str, Any]:
        """Return the figures of a student: see `figures_of`."""
        return figures_of(self.comparisons[weights], self.common)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparisons:
    """Comparisons of students with one teacher on one split."""

    teacher: Loaded
    test: Prepared
    """The split."""
    images: int | None
    """How many are searched, about; None for all."""
    runtime: Runtime
    device: torch.device
    """Where to compute."""
    store: Store
    """Where finished comparisons are kept."""

    def compare_all(self, students: Sequence[Path]) -> Compared:
        """Compare the students of weights files, or find the finished comparisons."""
        missing = [weights for weights in dict.fromkeys(students) if self.store.find(self._key(weights)) is None]
        with tqdm(total=len(students), desc="evaluate", unit="student", disable=None, leave=False) as bar:
            bar.update(len(students) - len(missing))
            for _ in self._compare_each(missing):
                bar.update()
        comparisons = {weights: read_comparison(self.store.path(self._key(weights))) for weights in students}
        return Compared(comparisons, common_pairs(comparisons.values()), len(missing))

    def _compare_each(self, students: Sequence[Path]) -> Iterator[int]:
        """Compare students; yields the number of each when it is finished."""
        if not students:
            return
        side = self.teacher_side()
        workers = side_by_side(self.runtime, self.device)
        tasks = [partial(self._compare, side, weights) for weights in students]
        if workers > 1:
            yield from run_in_forks(tasks, workers)
        else:
            for number, task in enumerate(tasks):
                task(0)
                yield number

    @one_cpu_thread()
    def teacher_accuracy(self) -> float:
        """Return the teacher's accuracy on the split."""
        return accuracy(frozen(self.teacher.model, self.device), self.test, self.device)

    @one_cpu_thread()  # so that results do not depend on how many there are, and forks may follow
    def teacher_side(self) -> TeacherSide:
        """Return what the teacher contributes to every comparison."""
        batch_size = search_batch(self.runtime, self.device)
        return teacher_side(self.teacher.model, self.test, self.device, batch_size, self.images)

    def compare_one(self, side: TeacherSide, weights: Path) -> Comparison:
        """Compare the student of a weights file, or find the finished comparison."""
        if self.store.find(self._key(weights)) is None:
            self._compare(side, weights, 0)
        return read_comparison(self.store.path(self._key(weights)))

    @one_cpu_thread()
    def _compare(self, side: TeacherSide, weights: Path, slot: int) -> None:
        student = load_with_digest(weights, self.test, "student")
        key = self._key_of(student.digest, student.model.architecture.network)
        comparison = compare(student.model, side, self.test, self.device, search_batch(self.runtime, self.device))
        write_comparison(self.store.path(key), comparison)
        self.store.seal(key)

    def _key(self, weights: Path) -> str:
        described = read_architecture(weights)
        return self._key_of(file_digest(weights), described.network if described else "")

    def _key_of(self, digest: str, network: str) -> str:
        code = comparison_code(network, self.teacher.model.architecture.network)
        parts = (digest, self.teacher.digest, self.test.digest, self.images, code)
        return f"{fingerprint(*parts)}/comparison.h5"
