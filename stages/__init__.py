"""The commands of the pipeline: one module for each DVC stage, and a few that are no stage."""

import io
import signal
import sys
from types import TracebackType


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Say in one line what the system refuses before or after a command, as when its `--help` cannot be written."""
    if isinstance(error, OSError) and "--debug" not in sys.argv:
        from stages.cli import say_refused

        say_refused(error)
    else:
        sys.__excepthook__(kind, error, traceback)


if sys.argv[0] == "-m":  # this is `python -m stages.<name>`
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command begins, Ctrl-C needs no traceback
    sys.excepthook = _tell
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal cannot show, as standard error has it
