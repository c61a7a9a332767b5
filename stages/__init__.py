"""The commands of the pipeline: one module for each DVC stage, and a few that are no stage."""

import signal
import sys

if sys.argv[0] == "-m":  # this is `python -m stages.<name>`: until the command begins, Ctrl-C needs no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
