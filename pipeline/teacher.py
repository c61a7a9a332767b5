"""Training the teacher, and its fingerprint."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

from pipeline.core.errors import WeightsError
from pipeline.core.extensions import own_modules
from pipeline.core.parameters import Params, Teacher
from pipeline.core.provenance import code_digest, fingerprint
from pipeline.core.store import Store
from pipeline.images.prepared import Prepared
from pipeline.machine.processes import Processes
from pipeline.networks.classifier import Architecture, Classifier, architecture_for, build
from pipeline.networks.pretrained import LIBRARY, read_start
from pipeline.networks.weights import load_weights, read_architecture
from pipeline.training.batches import FreshSource
from pipeline.training.fit import Fit, FitTask, fit, processes_of
from pipeline.training.objective import Objective


def teacher_code(network: str) -> str:
    """Return the digest of the code that decides a teacher of a named network."""
    return code_digest("pipeline.teacher", *own_modules(network))


def train_teacher(
    params: Params, train: Prepared, validation: Prepared | None, processes: Processes, store: Store
) -> Fit:
    """Train the teacher, or find the finished run; the validation split serves the curve only.

    Raises:
        WeightsError: the weights that training is to go on from are unusable or of another network.
    """
    teacher, views = params.teacher, params.views
    architecture = teacher_architecture(teacher, train)
    start = read_start(teacher.pretrained, architecture) if teacher.pretrained else None
    key = fingerprint(
        architecture._asdict(),
        teacher.model_dump(exclude={"weights", "pretrained"}),
        start.digest if start else None,
        views.model_dump(exclude_defaults=True),
        [train.digest, validation.digest if validation is not None else None],
        teacher_code(teacher.network),
        *processes_of(processes),
    )

    def source() -> FreshSource:
        batch_size = teacher.training.batch_size
        return FreshSource(train, views, teacher.seed, batch_size, processes.device)

    task = FitTask(
        key=key,
        architecture=architecture,
        source=source,
        objective=partial(Objective, smoothing=teacher.training.label_smoothing),
        training=teacher.training,
        seed=teacher.seed,
        validation=validation,
        start=start.state if start else None,
        description="teacher",
    )
    return fit(task, processes, store)


def imported_teacher(teacher: Teacher, data: Prepared) -> Classifier:
    """Return the teacher that `teacher.weights` names, for the images of a split.

    Raises:
        WeightsError: the weights are unusable, of another network or for other classes.
    """
    architecture = teacher_architecture(teacher, data)
    if teacher.weights != LIBRARY:
        return load_weights(Path(str(teacher.weights)), architecture)
    start = read_start(LIBRARY, architecture)
    if start.anew:
        raise WeightsError(
            f"teacher.weights: those of the library for {teacher.network} are for other classes than the "
            f"{architecture.classes} of the prepared data: fine-tune them with teacher.weights: null and "
            "teacher.pretrained: library"
        )
    model = build(architecture)
    model.network.load_state_dict(start.state, strict=False)  # counters of batches may be missing
    return model


def teacher_architecture(teacher: Teacher, data: Prepared) -> Architecture:
    """Return the teacher's architecture; it normalises as the parameters say, else its weights file, else the data.

    Raises:
        WeightsError: the parameters give another number of channels than the images have.
    """
    architecture = architecture_for(teacher.network, data)
    if teacher.mean and teacher.std:
        architecture = architecture._replace(mean=tuple(teacher.mean), std=tuple(teacher.std))
    elif teacher.pretrained or teacher.weights == LIBRARY:
        architecture = read_start(teacher.pretrained or LIBRARY, architecture).normalised_as(architecture)
    elif teacher.weights:
        with contextlib.suppress(WeightsError):  # without a description, or with another program's: not needed
            if described := read_architecture(Path(teacher.weights)):
                architecture = architecture._replace(mean=described.mean, std=described.std)
    if len(architecture.mean) != data.view_shape[0]:
        raise WeightsError(
            f"the teacher normalises {len(architecture.mean)} channels, the images have {data.view_shape[0]}: set "
            "teacher.mean and teacher.std, or dataset.channels"
        )
    return architecture
