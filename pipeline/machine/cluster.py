"""Tasks on the workers of a dask cluster: processes of this machine, or of others that see the same files."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pipeline.core.errors import TrainingError, WorkerError
from pipeline.core.parameters import Runtime
from pipeline.machine.device import set_up_device
from pipeline.machine.forks import interrupts_wait

if TYPE_CHECKING:
    from distributed import Client

Argument = TypeVar("Argument")
Result = TypeVar("Result")

Cluster = contextlib.AbstractContextManager[Any]

RETRIES = 2  # of a task that fails, for files that another machine sees late
CONNECT_SECONDS = 30
PATIENCE_SECONDS = 10  # without any result, before a look at the workers
_one_at_a_time = threading.Lock()  # in a worker, whose threads all serve one task


@contextlib.contextmanager
def connected(scheduler: str, runtime: Runtime, say: Callable[[str], None]) -> Iterator[Client]:
    """Yield a client of a cluster.

    Args:
        scheduler: a number of workers to start on this machine, which share its cores, or have a GPU each; or the
            address of a running cluster, as tcp://host:8786.
        runtime: device and threads.
        say: is told where the dashboard is.

    Raises:
        WorkerError: dask is not installed, or the cluster cannot be started or reached.
    """
    try:
        from distributed import Client
    except ImportError:
        raise WorkerError("dask is not installed: pip install 'boundary-distillation[dask]'") from None
    for name in ("distributed", *(name for name in logging.root.manager.loggerDict if name.startswith("distributed."))):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters comes as an error
    with contextlib.ExitStack() as stack:
        try:
            resource_tracker.ensure_running()  # which would let interrupts through when it starts
            with interrupts_wait():  # in the workers for ever: they end with the cluster
                address = (
                    stack.enter_context(_local_cluster(int(scheduler), runtime)) if scheduler.isdigit() else scheduler
                )
            client = stack.enter_context(Client(address, timeout=CONNECT_SECONDS))
        except (OSError, ValueError, TimeoutError) as error:
            raise WorkerError(f"--scheduler {scheduler}: cannot be started or reached: {error}") from None
        say(f"{_count_workers(client)} workers, dashboard {client.dashboard_link}")
        yield client


def _local_cluster(workers: int, runtime: Runtime) -> Cluster:
    if workers < 1:
        raise WorkerError(f"--scheduler {workers}: at least one worker is needed")
    if set_up_device(runtime).type == "cuda":
        try:
            from dask_cuda import LocalCUDACluster
        except ImportError:
            raise WorkerError("workers on GPUs need dask-cuda: pip install dask-cuda") from None
        return cast(Cluster, LocalCUDACluster(n_workers=workers, dashboard_address=":0"))
    from distributed import LocalCluster

    cluster: Cluster = LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        memory_limit=0,  # dask would stop a worker in the middle of a task
        dashboard_address=":0",
        silence_logs=logging.CRITICAL,
    )
    return cluster


def _count_workers(client: Client) -> int:
    return len(client.nthreads())


def on_workers(
    client: Client,
    function: Callable[[Argument], Result],
    tasks: Iterable[Argument],
    say: Callable[[str], None],
    failed: Callable[[Argument, TrainingError], None] | None = None,
) -> Iterator[Result]:
    """Yield results of a function that workers can import, as they come; a task whose worker dies is given to another.

    Args:
        client: of the cluster.
        function: called in a worker, one task at a time in each process.
        tasks: its arguments.
        say: is told when the cluster has no workers.
        failed: where given, is told of a task that raised a TrainingError, and the others go on.

    Raises:
        WorkerError: a task was lost with several workers, or the scheduler is gone.
        Exception: what a task raised, more than once.
    """
    from distributed import KilledWorker, wait
    from distributed.comm.core import CommClosedError

    waiting, running = deque(tasks), dict[Any, Argument]()
    try:
        while waiting or running:
            while waiting and len(running) < 2 * max(1, _count_workers(client)):
                task = waiting.popleft()
                running[client.submit(_call, function, task, pure=False, retries=RETRIES)] = task
            try:
                done, _ = wait(list(running), timeout=PATIENCE_SECONDS, return_when="FIRST_COMPLETED")
            except TimeoutError:
                if _count_workers(client) == 0:
                    say("the cluster has no workers: waiting for some")
                continue
            for future in done:
                task, result = running.pop(future), future.result()
                if not isinstance(result, TrainingError):
                    yield result
                elif failed is None:
                    raise result
                else:
                    failed(task, result)
    except KilledWorker as error:
        workers = error.allowed_failures + 1
        raise WorkerError(f"{workers} workers died with the same task, perhaps for want of memory") from None
    except (CancelledError, CommClosedError):
        raise WorkerError("the scheduler is gone: run again, finished work is kept") from None


def _call(function: Callable[[Argument], Result], task: Argument) -> Result | TrainingError:
    with _one_at_a_time:
        try:
            return function(task)
        except TrainingError as error:  # would come again: not to be retried
            return error
