"""Training students on the workers of a cluster: paths and a seed in, a finished run in the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from pipeline.cluster import on_workers
from pipeline.config import Params, check_params
from pipeline.errors import WorkerError
from pipeline.runtime import Processes, choose_device
from pipeline.storage import Store
from pipeline.student_run import InputPaths, Inputs, StudentRun, threads_each

if TYPE_CHECKING:
    from distributed import Client


class Job(NamedTuple):
    """What a worker needs to train any student."""

    params: str
    """All parameters as JSON."""
    inputs: InputPaths
    """Paths are absolute."""
    store: Path
    threads: int
    """Of the CPU, for each run: as many as a run has on the client."""


class Task(NamedTuple):
    """One run."""

    student: str
    method: str
    seed: int
    key: str
    """Its fingerprint, as the client sees it."""


def fit_on_workers(
    client: Client,
    params: Params,
    inputs: InputPaths,
    store: Store,
    tasks: list[Task],
    say: Callable[[str], None],
) -> Iterator[Task]:
    """Train with workers until every run is finished in the store: each as in a process of its own, in any order."""
    job = Job(
        params.model_dump_json(),
        inputs.absolute(),
        store.root.absolute(),
        threads_each(params.runtime, choose_device(params.runtime)),
    )
    yield from on_workers(client, partial(fit_one, job), tasks, say)


def fit_one(job: Job, task: Task) -> Task:
    """Train one student with one seed, on a worker.

    Raises:
        WorkerError: the worker has other files or other code than the client.
    """
    torch.set_num_threads(job.threads)
    if _run(job, task.student, task.method).key(task.seed) != task.key:  # what it has read may be of an earlier run
        _run.cache_clear()
        _inputs.cache_clear()
    run = _run(job, task.student, task.method)
    if run.key(task.seed) != task.key:
        files = ", ".join(map(str, job.inputs))
        raise WorkerError(f"a worker has other code or other files ({files}) than this machine: restart it")
    run.fit(task.seed, bar_position=None)
    return task


@lru_cache(maxsize=1)
def _run(job: Job, student: str, method: str) -> StudentRun:
    """Shards are loaded once for all seeds in a row."""
    params = _params(job)
    processes = Processes(params.runtime, params.training.precision)
    inputs = _inputs(job, params.method[method].source)
    return StudentRun(params, student, method, inputs, processes, Store(job.store))


@lru_cache(maxsize=3)
def _inputs(job: Job, source: str) -> Inputs:
    return job.inputs.read(source)


def _params(job: Job) -> Params:
    params = check_params(json.loads(job.params), "the client's parameters")
    return params.model_copy(update={"runtime": params.runtime.model_copy(update={"threads": job.threads})})
