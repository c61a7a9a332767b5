"""What all commands share: parameters, progress, and errors in one line."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from traceback import walk_tb
from typing import Any, TextIO

import click

from pipeline.core.errors import ParameterError, PipelineError, PipelineWarning, known_problem, shown
from pipeline.core.files import local_path
from pipeline.core.text import one_line
from pipeline.core.timings import RunRecord, record_run

WORK = Path(".work")  # the private store: ignored by git and DVC
RUNS = "runs"  # in it: how long stages took


class LocalPath(click.Path):
    """A path as `local_path` takes it."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        return super().convert(local_path(value), parameter, context)


PATH = LocalPath(path_type=Path)

EXIT_FAILED, EXIT_BAD_PARAMETERS, EXIT_INTERRUPTED = 1, 2, 130
EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 bad parameters or usage, 130 interrupted."
GO_ON = "what is finished is kept, run the same command to go on"
NOTHING_WRITTEN = "nothing was written, run the same command again"


def params_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the option for the parameter file."""
    return click.option(
        "--params", "params_path", type=PATH, default=Path("params.yaml"), show_default=True, help="Parameter file."
    )(function)


def path_option(name: str, default: str, text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return an option for an input or output path."""
    return click.option(name, type=PATH, default=Path(default), show_default=True, help=text)


def other_data_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the option to take shards and prepared files of different datasets."""
    return click.option(
        "--other-data", is_flag=True, help="Shards of other images than the prepared ones are taken; the table says so."
    )(function)


def scheduler_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the option to work on a dask cluster."""
    return click.option(
        "--scheduler",
        metavar="N|ADDRESS",
        help="Work on a dask cluster: N workers of this machine, or the scheduler at tcp://HOST:PORT, whose workers "
        "see the same files.  [default: in this process]",
    )(function)


def errors_in_one_line(function: Callable[..., Any] | None = None, *, interrupted: str = GO_ON) -> Callable[..., Any]:
    """Turn what a user can mend into one line and an exit code; with --debug into a traceback.

    Args:
        function: the command.
        interrupted: what it says after Ctrl-C.
    """
    if function is None:
        return functools.partial(errors_in_one_line, interrupted=interrupted)

    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(function)
    def command(*args: Any, debug: bool, **options: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        sys.unraisablehook = _interrupt_again
        try:
            with _warnings_in_one_line():
                function(*args, **options)
        except KeyboardInterrupt:
            _complain(f"\ninterrupted: {interrupted}")
            sys.exit(EXIT_INTERRUPTED)
        except PipelineError as error:
            if debug:
                raise
            _complain(f"error: {error}")
            sys.exit(EXIT_BAD_PARAMETERS if isinstance(error, ParameterError) else EXIT_FAILED)
        except OSError as error:
            if debug or isinstance(error, BrokenPipeError):  # whoever read has had enough: click ends quietly
                raise
            say_refused(error)
            sys.exit(EXIT_FAILED)
        except (MemoryError, RuntimeError) as error:
            known = None if debug else known_problem(error)
            if known is None:
                raise
            _complain(f"error: {known} ({one_line(error)[:200]})")
            sys.exit(EXIT_FAILED)

    return command


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Say each warning of the library in one line, and not twice; others are shown as ever."""
    said = set[str]()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, PipelineWarning):
            show_others(message, category, filename, lineno, file, line)
        elif str(message) not in said:
            said.add(str(message))
            _complain(f"warning: {message}")

    with warnings.catch_warnings():
        show_others, warnings.showwarning = warnings.showwarning, show
        warnings.simplefilter("always", PipelineWarning)
        yield


def _interrupt_again(dropped: sys.UnraisableHookArgs) -> None:
    """Raise once more, a moment later, a Ctrl-C that Python drops in a finaliser or a weak reference's callback."""
    if dropped.exc_type is KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(dropped)


def say_refused(error: OSError) -> None:
    """Say in one line what the system refuses: to write standard output, or of which file what."""
    where = f"{shown(str(error.filename))}: " if error.filename is not None else ""
    if any(frame.f_globals.get("__name__") == click.echo.__module__ for frame, _ in walk_tb(error.__traceback__)):
        where = "standard output: "
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python may try again when it ends
    _complain(f"error: {where}{error.strerror or one_line(error)}")


def _complain(message: str) -> None:
    """Tell the user; of several processes on one training run, the first one does."""
    if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
        click.echo(message, err=True)


def say(message: str) -> None:
    """Say one line about what is going on, past any progress bar."""
    click.echo(message, err=True)


def warn(message: str | None) -> None:
    """Say, if there is something, what is likely to be wrong although it stops nothing."""
    if message is not None:
        say(f"warning: {message}")


def done(name: str, line: str, begin: float, worked: bool = True) -> None:
    """Say the last line of a stage: what it wrote. If it had work to do, keep it with the seconds it took."""
    if worked:
        record_run(WORK / RUNS, name, RunRecord(seconds=time.perf_counter() - begin, said=line))
    click.echo(line)
