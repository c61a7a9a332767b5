"""How far an experiment is, and how long its other runs train, from a short measurement of which nothing is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pipeline.attack.dataset import SampleDataset, make_samples
from pipeline.core.store import Store
from pipeline.experiment.run import ExperimentRun, WantedRun
from pipeline.machine.device import side_by_side
from pipeline.shards.reader import BoundaryShards
from pipeline.student.plan import Speed, seconds_of, speed_of
from pipeline.student.run import StudentRun

BATCHES = 2  # of images, of which samples are made to measure with


class ExperimentPlan(NamedTuple):
    """What an experiment has and lacks."""

    recorded: int
    """Runs."""
    missing: int
    hours: float
    """In which the missing ones are trained; samples and comparisons are not counted."""


def plan_experiment(experiment: ExperimentRun) -> ExperimentPlan:
    """Count the runs, and measure each student by each method where one is missing, once for all labels and draws."""
    with tempfile.TemporaryDirectory() as folder:

        @cache
        def some_shards(teacher: Path) -> BoundaryShards:
            return _some_shards(experiment, teacher, Path(tempfile.mkdtemp(dir=folder)))

        found, lacking, seconds = set[str](), set[str](), 0.0  # a run may belong to several combinations
        speeds: dict[tuple[object, ...], Speed] = {}
        for wanted, variant, draw in experiment.parts():
            missing = [run for run in experiment.missing(wanted) if run.wanted not in lacking]
            lacking |= {run.wanted for run in missing}
            found |= {run.wanted for run in wanted} - lacking
            if missing:
                train, teacher = experiment.part(variant, draw), experiment.teacher_of(variant)
                shards = some_shards(teacher) if any(run.reads_shards for run in missing) else None
                students = experiment.students(missing, train, teacher, shards)
                seconds += _seconds(students, missing, teacher, len(train.labels), speeds)
    return ExperimentPlan(len(found), len(lacking), seconds / 3600)


def _seconds(
    students: Mapping[tuple[str, str], StudentRun],
    missing: Sequence[WantedRun],
    teacher: Path,
    rows: int,
    speeds: dict[tuple[object, ...], Speed],
) -> float:
    """Return how long the runs of one combination and draw train side by side; what is measured goes into `speeds`."""
    groups = {
        cell: student.groups(run.seed for run in missing if (run.student, run.method) == cell)
        for cell, student in students.items()
    }
    some = next(iter(students.values()))
    most = side_by_side(some.params.runtime, some.processes.device)
    workers, seconds = min(most, sum(map(len, groups.values()))), 0.0
    for cell, student in students.items():
        reads_teacher = student.method.source == "online" or student.method.reads_features
        key = (*cell, student.method.source, student.params.training.batch_size, teacher if reads_teacher else None)
        if key not in speeds:
            speeds[key] = speed_of(student, groups[cell][0], workers)
        seconds += sum(seconds_of(student, len(group), speeds[key], rows) for group in groups[cell]) / workers
    return seconds


def _some_shards(experiment: ExperimentRun, teacher: Path, folder: Path) -> BoundaryShards:
    """Make one view of a few training images."""
    attack = experiment.params.attack.model_copy(update={"views": 1, "embed_images": True})
    params = experiment.params.model_copy(update={"attack": attack})
    few = experiment.materials.train.thinned(BATCHES * params.training.batch_size)
    loaded = experiment.evaluations[teacher].teacher
    dataset = SampleDataset.of(few, params, loaded, Store(folder / "store"))
    for _ in make_samples(dataset, loaded.model, params, dataset.missing()):
        pass
    dataset.publish(folder / "samples")
    return BoundaryShards(folder / "samples")
