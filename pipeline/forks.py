"""Tasks side by side in forks of this process, which share what it has loaded."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from pipeline.errors import PipelineError, WorkerError

PR_SET_PDEATHSIG = 1  # linux/prctl.h

Task = Callable[[int], None]
"""Called with the number of its slot, counted from 0; leaves its result in files."""


def run_in_forks(tasks: Iterable[Task], slots: int) -> Iterator[int]:
    """Run tasks, so many at a time, each in a fork of this process; yields the number of each when it has ended.

    The first error, or Ctrl-C, ends the tasks that still run, and the others do not begin. A fork hangs in torch
    operations of several threads if this process has run such operations before: OpenMP's threads do not live on in it.

    Raises:
        WorkerError: a fork was killed.
        PipelineError: what a task raised, with its traceback as a note.
        RuntimeError: a task raised something else; the traceback is in the message.
    """
    waiting, running, free = list(enumerate(tasks)), dict[Any, _Fork](), list(range(slots))
    try:
        while waiting or running:
            while waiting and free:
                fork = _Fork(*waiting.pop(0), free.pop(0))
                running[fork.outcome] = fork
            for outcome in wait(list(running)):
                fork = running.pop(outcome)
                free = sorted([*free, fork.slot])
                fork.finish(slots)
                yield fork.number
    finally:
        for fork in running.values():
            fork.process.kill()
            fork.process.join()


class _Fork:
    """A task that runs."""

    def __init__(self, number: int, task: Task, slot: int) -> None:
        context = multiprocessing.get_context("fork")
        self.number, self.slot = number, slot
        self.outcome, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_run, args=(task, slot, sender, os.getpid()))
        _start_without_interrupt(self.process)
        sender.close()

    def finish(self, slots: int) -> None:
        """Raise what the task raised."""
        try:
            error = self.outcome.recv()
        except EOFError:
            error = None
        self.process.join()
        if error is not None:
            raise error
        if self.process.exitcode == -signal.SIGINT:  # Ctrl-C, seen here before this process has its own signal
            raise KeyboardInterrupt
        if self.process.exitcode:
            raise WorkerError(
                f"a worker process was killed (exit code {self.process.exitcode}), perhaps for want of memory: set "
                f"runtime.workers to less than {slots}; what is finished is kept"
            )


def _start_without_interrupt(process: Any) -> None:
    """Fork at a time when Ctrl-C waits, until the fork has its own way to end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(task: Task, slot: int, sender: Connection, parent: int) -> None:
    """What a fork does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no orphan goes on when the parent is killed (Linux)
    if os.getppid() != parent:  # it was killed before
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent tells the user
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        task(slot)
    except PipelineError as error:
        error.add_note(traceback.format_exc())
        sender.send(error)
    except Exception as error:  # which may not survive the way through a pipe
        sender.send(RuntimeError(f"{type(error).__name__} in a fork: {error}\n{traceback.format_exc()}"))
