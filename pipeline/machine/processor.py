"""The CPU and its memory: the name, and how much of them this process may use; no torch."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # those that torch obeys


class Limit(NamedTuple):
    """So many cores or threads, and what allows no more."""

    most: int
    reason: str


def processor() -> str:
    """Return the name of the CPU, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def cores(root: Path = Path("/")) -> Limit:
    """Return how many cores this process may keep busy: the least of machine, affinity and CPU quotas.

    A quota of a part of a core counts as a whole one.

    Args:
        root: of the file system that says which quotas there are.
    """
    limits = [Limit(os.cpu_count() or 1, "all there are"), Limit(len(os.sched_getaffinity(0)), "CPU affinity")]
    limits += [Limit(max(1, math.ceil(quota)), f"CPU quota {quota:g} in {place}") for quota, place in _quotas(root)]
    return min(limits, key=lambda limit: limit.most)


def threads(root: Path = Path("/")) -> Limit:
    """Return how many threads a process should compute with: one for each core, or fewer if the environment says so."""
    asked = ((name, os.environ.get(name, "").partition(",")[0].strip()) for name in THREAD_VARIABLES)
    limits = [Limit(int(value), name) for name, value in asked if value.isdecimal() and int(value)]
    return min([cores(root), *limits], key=lambda limit: limit.most)


def free_memory(root: Path = Path("/")) -> int:
    """Return how many bytes this process may still take: the least of what the machine and its control groups leave.

    Args:
        root: of the file system that says which limits there are.
    """
    left = [_left_by(place) for place in _groups("memory", root)]
    machine = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([machine, *(each for each in left if each is not None)]))


def _left_by(place: Path) -> int | None:
    """Return how many bytes one control group leaves; None without a limit."""
    for names in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            limit, used = (int((place / name).read_text(encoding="utf-8")) for name in names)
            numbers = dict(line.split() for line in (place / "memory.stat").read_text(encoding="utf-8").splitlines())
        except (OSError, ValueError):  # no such file, or 'max'
            continue
        return limit - used + int(numbers.get("inactive_file", 0))  # of which the kernel takes back what it needs
    return None


def _quotas(root: Path) -> Iterator[tuple[float, Path]]:
    """Yield the CPU quota, in cores, of every control group that this process is in, and of all around it."""
    for place in _groups("cpu", root):
        quota = _quota_of(place)
        if quota is not None:
            yield quota, place


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of every control group of a controller that this process is in, and of all around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:  # version 2
            mounts = ["", "unified"]
        elif controller in controllers.split(","):
            mounts = [controllers, controller]
        else:
            continue
        # In a container the group may be named as the host sees it, while only what is within is mounted.
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for mount in dict.fromkeys(mounts):
            for depth in range(len(parts), -1, -1):
                yield Path(root, "sys/fs/cgroup", mount, *parts[:depth])


def _quota_of(place: Path) -> float | None:
    """Return the quota of one control group, in cores; None without one."""
    names = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    for files in names:
        try:
            quota, period = map(int, " ".join((place / name).read_text(encoding="utf-8") for name in files).split())
        except (OSError, ValueError):  # no such file, or 'max'
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None
