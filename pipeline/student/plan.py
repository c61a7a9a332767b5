"""What training students would cost, from a short measurement of which nothing is kept."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

from pipeline.machine.device import side_by_side
from pipeline.networks.predict import accuracies, rows_of_a_batch
from pipeline.networks.stack import Stack
from pipeline.student.run import StudentRun, fit_side_by_side, named
from pipeline.training.batches import Batch, Source
from pipeline.training.fit import TrainingRun, first_network

MOMENTS = 4  # of training, evenly spread: losses come and go with the epochs
SECONDS = 0.5  # of training that are measured at each of them, behind a step that warms up
RATE = 1e-9  # of learning: the epochs that lead to a moment are left out, and the loss must stay finite


class Speed(NamedTuple):
    """Images that one worker gets through in a second, beside the others; of a stack, those of all members."""

    trained: float
    evaluated: float
    """For the curve; infinite where no split is evaluated."""


class StudentPlan(NamedTuple):
    """What the seeds of a student by a method would cost."""

    runs: int
    """That are not finished."""
    rate: float | None
    """Images per second that all workers train; None where there is nothing to train."""
    hours: float


def plan_student(run: StudentRun) -> StudentPlan:
    """Count the seeds without a finished run, and measure how long they take on this machine."""
    unfinished = run.unfinished()
    groups = run.groups(unfinished)
    if not groups:
        return StudentPlan(0, None, 0.0)
    workers = min(side_by_side(run.params.runtime, run.processes.device), len(groups))
    speed = speed_of(run, groups[0], workers)
    seconds = math.ceil(len(groups) / workers) * seconds_of(run, len(groups[0]), speed, run.rows())
    return StudentPlan(len(unfinished), workers * speed.trained, seconds / 3600)


def seconds_of(run: StudentRun, seeds: int, speed: Speed, rows: int) -> float:
    """Return how long a worker trains so many seeds, on so many images an epoch."""
    evaluated = sum(len(split.labels) for split in (run.inputs.validation, run.inputs.test) if split is not None)
    return run.params.training.epochs * seeds * (rows / speed.trained + evaluated / speed.evaluated)


def speed_of(run: StudentRun, group: Sequence[int], workers: int) -> Speed:
    """Let so many workers train the seeds of a group for some seconds, as they would; returns the mean of a worker."""
    run.load()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.json" for number in range(workers)]
        tasks = [partial(_measure, run, group, file) for file in files]
        for _ in fit_side_by_side(tasks, run.params.runtime, run.processes):
            pass
        speeds = [Speed(*json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return Speed(*(sum(each) / workers for each in zip(*speeds, strict=True)))


def _measure(run: StudentRun, group: Sequence[int], file: Path, slot: int) -> None:
    """Train the seeds of a group, or the first of them where they are trained one by one, and write their `Speed`."""
    seeds = group if run.is_stacked(group) else group[:1]
    with named(f"{run.name} seed {seeds[0]}"):
        tasks = [run.task(seed, run.name) for seed in seeds]
        members, parameters = [first_network(task) for task in tasks], tasks[0].training
        student = Stack(members) if len(members) > 1 else members[0]
        slow = parameters.model_copy(update={"learning_rate": RATE})
        objective = tasks[0].objective(student)
        training = TrainingRun(run.processes.start(), student, objective, slow, checkpoint=file)
        source = run.stacked_source(seeds) if len(seeds) > 1 else tasks[0].source()
        epochs = parameters.epochs
        moments = [(2 * number + 1) * epochs // (2 * MOMENTS) for number in range(MOMENTS)]
        trained = MOMENTS / sum(_seconds_an_image(training, source, epoch, epochs, seeds) for epoch in moments)
        evaluated, split = math.inf, run.inputs.validation
        if split is not None:
            few = split.thinned(rows_of_a_batch(split.view_shape))
            begin = time.perf_counter()
            accuracies(training.model, len(seeds), few, run.processes.device)
            evaluated = len(few.labels) * len(seeds) / (time.perf_counter() - begin)
    file.write_text(json.dumps([trained, evaluated]), encoding="utf-8")


def _seconds_an_image(training: TrainingRun, source: Source, epoch: int, epochs: int, seeds: Sequence[int]) -> float:
    batches, moment = _Stretch(source, epoch), training.objective.moment(epoch, epochs)
    training.train_epoch(batches, epoch, moment, seeds)
    batches.seconds = SECONDS
    begin = time.perf_counter()
    training.train_epoch(batches, epoch, moment, seeds)
    return (time.perf_counter() - begin) / batches.images


class _Stretch:
    """Batches from an epoch on: one, and when some seconds are set, those that follow until they have passed."""

    def __init__(self, source: Source, epoch: int) -> None:
        self.rows, self.seconds, self.images = source.rows, 0.0, 0
        self.batches = chain.from_iterable(source.epoch(number) for number in count(epoch))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        self.images, end = 0, time.perf_counter() + self.seconds
        for batch in self.batches:
            self.images += batch.labels.numel()
            yield batch
            if time.perf_counter() > end:
                return
