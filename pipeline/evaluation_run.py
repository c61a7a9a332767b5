"""Comparing many students with their teacher: finished comparisons are kept by fingerprint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from pipeline.config import Params
from pipeline.data import Prepared
from pipeline.evaluation import Comparison, TeacherSide, compare, read_comparison, teacher_side, write_comparison
from pipeline.forks import run_in_forks
from pipeline.models import Classifier, placed
from pipeline.prediction import accuracy
from pipeline.provenance import code_digest, fingerprint
from pipeline.runtime import one_cpu_thread, search_batch, side_by_side
from pipeline.storage import Store, file_digest
from pipeline.teacher import load_with_digest


class Evaluation:
    """Comparisons of students with one teacher on one split.

    Args:
        teacher, teacher_digest: the teacher, and the sha256 of its file.
        test: the split.
        params: how many images are searched, and the machine.
        device: where to compute.
        store: where finished comparisons are kept.
    """

    def __init__(
        self,
        teacher: Classifier,
        teacher_digest: str,
        test: Prepared,
        params: Params,
        device: torch.device,
        store: Store,
    ) -> None:
        self.teacher, self.teacher_digest, self.test = teacher, teacher_digest, test
        self.images, self.runtime = params.evaluation.similarity_images, params.runtime
        self.device, self.store = device, store
        self.code = code_digest("pipeline.evaluation", alone=("pipeline.evaluation_run",))

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
            from torchmetrics.functional import classification  # noqa: F401 (slow; once for all forks)

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
        return accuracy(placed(self.teacher, self.device), self.test, self.device)

    @one_cpu_thread()  # so that results do not depend on how many there are, and forks may follow
    def _of_teacher(self) -> TeacherSide:
        batch_size = search_batch(self.runtime, self.device)
        return teacher_side(self.teacher, self.test, self.device, batch_size, self.images)

    @one_cpu_thread()
    def _compare(self, side: TeacherSide, weights: Path, slot: int) -> None:
        student, digest = load_with_digest(weights, self.test, "student")
        key = self._key_of(digest)
        comparison = compare(student, side, self.test, self.device, search_batch(self.runtime, self.device))
        write_comparison(self.store.path(key), comparison)
        self.store.seal(key)

    def _key(self, weights: Path) -> str:
        return self._key_of(file_digest(weights))

    def _key_of(self, digest: str) -> str:
        parts = (digest, self.teacher_digest, self.test.digest, self.images, self.code)
        return f"{fingerprint(*parts)}/comparison.h5"
