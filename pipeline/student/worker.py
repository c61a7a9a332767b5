"""Training students on the workers of a cluster: paths and a seed in, a finished run in the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from pipeline.core.errors import TrainingError, WorkerError
from pipeline.core.parameters import Params, check_params, for_workers
from pipeline.core.store import Store
from pipeline.machine.cluster import on_workers
from pipeline.machine.device import set_up_device
from pipeline.machine.processes import Processes
from pipeline.student.inputs import InputPaths, StudentInputs
from pipeline.student.run import StudentRun, threads_each

if TYPE_CHECKING:
    from distributed import Client


class FitJob(NamedTuple):
    """What a worker needs to train any student."""

    params: str
    """All parameters as JSON."""
    inputs: InputPaths
    """Paths are absolute."""
    store: Path
    threads: int
    """Of the CPU, for each run: as many as a run has on the client."""


class GroupRun(NamedTuple):
    """The runs of a group of seeds."""

    student: str
    method: str
    seeds: tuple[int, ...]
    key: str
    """Fingerprint of the first one, as the client sees it."""


def fit_on_workers(
    client: Client,
    params: Params,
    inputs: InputPaths,
    store: Store,
    runs: list[GroupRun],
    say: Callable[[str], None],
    failed: Callable[[str, TrainingError], None],
) -> Iterator[GroupRun]:
    """Train with workers until every run is finished in the store: each as in a process of its own, in any order.

    `failed` is told the name STUDENT-METHOD and the error of a run that cannot be trained.
    """
    job = FitJob(
        for_workers(params),
        inputs.absolute(),
        store.root.absolute(),
        threads_each(params.runtime, set_up_device(params.runtime)),
    )

    def tell(run: GroupRun, error: TrainingError) -> None:
        failed(f"{run.student}-{run.method}", error)

    yield from on_workers(client, partial(fit_one, job), runs, say, tell)


def fit_one(job: FitJob, wanted: GroupRun) -> GroupRun:
    """Train one student with the seeds of a group, on a worker.

    Raises:
        WorkerError: the worker has other files or other code than the client.
    """
    torch.set_num_threads(job.threads)
    _params(job)  # whose modules of the user are those that names mean: a worker may serve several projects
    if (
        _run(job, wanted.student, wanted.method).key(wanted.seeds[0]) != wanted.key
    ):  # what it has read may be of an earlier run
        _run.cache_clear()
        _inputs.cache_clear()
    run = _run(job, wanted.student, wanted.method)
    if run.key(wanted.seeds[0]) != wanted.key:
        files = ", ".join(map(str, job.inputs[:3]))
        raise WorkerError(f"a worker has other code or other files ({files}) than this machine: restart it")
    run.fit_group(wanted.seeds, bar_position=None)
    return wanted


@lru_cache(maxsize=1)
def _run(job: FitJob, student: str, method: str) -> StudentRun:
    """Put a run together; shards are loaded once for all seeds in a row."""
    params = _params(job)
    processes = Processes(params.runtime, params.training.precision)
    inputs = _inputs(job, params.method[method].source)
    return StudentRun.of(params, student, method, inputs, processes, Store(job.store))


@lru_cache(maxsize=3)
def _inputs(job: FitJob, source: str) -> StudentInputs:
    return job.inputs.read(source)


def _params(job: FitJob) -> Params:
    params = check_params(json.loads(job.params), "the client's parameters")
    return params.model_copy(update={"runtime": params.runtime.model_copy(update={"threads": job.threads})})
