"""Tasks side by side in forks of this process, which share what it has loaded."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any

from pipeline.core.errors import PipelineError, WorkerError

PR_SET_PDEATHSIG = 1  # linux/prctl.h

SlotTask = Callable[[int], None]
"""Called with the number of its slot, counted from 0; leaves its result in files."""


def run_in_forks(
    tasks: Iterable[SlotTask], slots: int, failed: Callable[[int, PipelineError], None] | None = None
) -> Iterator[int]:
    """Run tasks, so many at a time, in forks of this process; yields the number of each when it has ended.

    The first error, or Ctrl-C, ends the tasks that still run, and the others do not begin. A fork hangs in torch
    operations of several threads if this process has run such operations before: OpenMP's threads do not live on in it.

    Args:
        tasks: each is called in a fork.
        slots: how many run at a time.
        failed: where given, is told the number and the error of a task that raised a PipelineError, and the others go
            on.

    Raises:
        WorkerError: a fork was killed.
        PipelineError: what a task raised, with its traceback as a note, unless `failed` is told.
        RuntimeError: a task raised something else; the traceback is in the message.
    """
    tasks = list(tasks)
    waiting, forks, running = iter(range(len(tasks))), list[_Fork](), dict[Any, _Fork]()
    try:
        for slot, number in zip(range(slots), waiting, strict=False):
            forks.append(_Fork(tasks, slot))
            running[forks[-1].begin(number)] = forks[-1]
        while running:
            for connection in wait(list(running)):
                fork = running.pop(connection)
                try:
                    fork.finish(slots)
                except PipelineError as error:
                    if failed is None or not fork.process.is_alive():
                        raise
                    failed(fork.number, error)
                done = fork.number
                for number in islice(waiting, 1):
                    running[fork.begin(number)] = fork
                yield done
    finally:
        for fork in forks:
            fork.process.kill()
            fork.process.join()


class _Fork:
    """A process that runs one task after the other."""

    def __init__(self, tasks: Sequence[SlotTask], slot: int) -> None:
        context = multiprocessing.get_context("fork")
        self.number = -1
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_run, args=(tasks, slot, other, os.getpid()))
        with interrupts_wait():  # until the fork has its own way to end
            self.process.start()
        other.close()

    def begin(self, number: int) -> Connection:
        """Let it run a task; the connection is ready to be read when the task has ended, well or not."""
        self.number = number
        with contextlib.suppress(BrokenPipeError):  # it was killed, which `finish` finds out
            self.connection.send(number)
        return self.connection

    def finish(self, slots: int) -> None:
        """Raise what the task that has ended raised."""
        try:
            error = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            if self.process.exitcode == -signal.SIGINT:  # Ctrl-C, seen here before this process has its own signal
                raise KeyboardInterrupt from None
            raise WorkerError(
                f"a worker process was killed (exit code {self.process.exitcode}), perhaps for want of memory: set "
                f"runtime.workers to less than {slots}; what is finished is kept"
            ) from None
        if error is not None:
            raise error


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the body; processes and threads that start in it never see it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent: int) -> None:
    """Let this process be killed when its parent (a process id) is, or was: no orphan stays (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _run(tasks: Sequence[SlotTask], slot: int, connection: Connection, parent: int) -> None:
    """Run the tasks that a fork is given."""
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent tells the user
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    while True:
        number = connection.recv()
        outcome: Exception | None = None
        try:
            tasks[number](slot)
        except (PipelineError, MemoryError) as error:
            error.add_note(traceback.format_exc())
            outcome = error
        except Exception as error:  # which may not survive the way through a pipe
            outcome = RuntimeError(f"{type(error).__name__} in a fork: {error}\n{traceback.format_exc()}")
        connection.send(outcome)
