"""Comparing many students with their teacher: finished comparisons are kept by fingerprint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from pipeline.core.extensions import own_modules
from pipeline.core.files import file_digest
from pipeline.core.parameters import Runtime
from pipeline.core.provenance import code_digest, fingerprint
from pipeline.core.store import Store
from pipeline.evaluate.compare import Comparison, TeacherSide, compare, read_comparison, teacher_side, write_comparison
from pipeline.images.prepared import Prepared
from pipeline.machine.device import one_cpu_thread, search_batch, side_by_side
from pipeline.machine.forks import run_in_forks
from pipeline.networks.fast import frozen
from pipeline.networks.loading import Loaded, load_with_digest
from pipeline.networks.predict import accuracy
from pipeline.networks.weights import read_architecture

CODE = ("pipeline.evaluate.compare",)


def comparison_code(*networks: str) -> str:
    """Return the digest of the code that decides a comparison of these networks, by name."""
    return code_digest(*CODE, *dict.fromkeys(own_modules(*networks)), alone=("pipeline.evaluate.run",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
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

    def compare_all(self, students: Sequence[Path]) -> Iterator[int]:
        """Compare the students of weights files; yields how many of them are finished, as they are."""
        missing = [weights for weights in dict.fromkeys(students) if self.store.find(self._key(weights)) is None]
        done = len(students) - len(missing)
        yield done
        if not missing:
            return
        side = self._of_teacher()
        workers = side_by_side(self.runtime, self.device)
        tasks = [partial(self._compare, side, weights) for weights in missing]
        if workers > 1:
            for number, _ in enumerate(run_in_forks(tasks, workers)):
                yield done + number + 1
        else:
            for number, task in enumerate(tasks):
                task(0)
                yield done + number + 1

    def comparison(self, weights: Path) -> Comparison:
        """A finished comparison."""
        return read_comparison(self.store.path(self._key(weights)))

    @one_cpu_thread()
    def teacher_accuracy(self) -> float:
        """The teacher's accuracy on the split."""
        return accuracy(frozen(self.teacher.model, self.device), self.test, self.device)

    @one_cpu_thread()  # so that results do not depend on how many there are, and forks may follow
    def _of_teacher(self) -> TeacherSide:
        batch_size = search_batch(self.runtime, self.device)
        return teacher_side(self.teacher.model, self.test, self.device, batch_size, self.images)

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
