"""The name of the CPU; no torch."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """Return the name of the CPU, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
