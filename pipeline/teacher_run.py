"""Training the teacher: its fingerprint and its loss."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.batches import Batch, FreshSource
from pipeline.config import Params
from pipeline.data import Prepared
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
        processes, store, key, architecture, source, _loss, teacher.training, teacher.seed, validation, "teacher"
    )


def _loss(model: nn.Module, batch: Batch, progress: float) -> Tensor:
    return F.cross_entropy(model(batch.images), batch.labels)
