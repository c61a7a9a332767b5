"""Training the teacher, and its fingerprint."""

from __future__ import annotations

from pipeline.batches import FreshSource
from pipeline.config import Params
from pipeline.data import Prepared
from pipeline.objective import Objective
from pipeline.provenance import code_digest, fingerprint
from pipeline.runtime import Processes
from pipeline.storage import Store
from pipeline.teacher import teacher_architecture
from pipeline.training import Fit, fit, processes_of


def train_teacher(
    params: Params, train: Prepared, validation: Prepared | None, processes: Processes, store: Store
) -> Fit:
    """Train the teacher, or find the finished run; the validation split serves the curve only."""
    teacher, dataset = params.teacher, params.dataset
    architecture = teacher_architecture(teacher, train)
    key = fingerprint(
        architecture._asdict(),
        teacher.model_dump(exclude={"weights"}),
        [dataset.padding, dataset.flip],
        [train.digest, validation.digest if validation is not None else None],
        code_digest("pipeline.teacher_run"),
        *processes_of(processes),
    )

    def source() -> FreshSource:
        batch_size = teacher.training.batch_size
        return FreshSource(train, dataset.padding, dataset.flip, teacher.seed, batch_size, processes.device)

    return fit(
        processes, store, key, architecture, source, Objective, teacher.training, teacher.seed, validation, "teacher"
    )
