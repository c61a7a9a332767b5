"""The machine: device and threads. Nothing here decides what is computed."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

import torch

from pipeline.core.errors import ParameterError
from pipeline.core.parameters import Runtime
from pipeline.machine.processor import cores, threads

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
KEPT_BYTES = 1 << 30  # of memory that is free but may be needed again
LARGEST_FROM_HEAP = 1 << 25  # bytes, the most that glibc takes


def set_up_device(runtime: Runtime) -> torch.device:
    """Set this process up to compute, and return the device: float32 arithmetic is exact and repeatable on it.

    Raises:
        ParameterError: a GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if runtime.device == "cuda" and not available:
        raise ParameterError("runtime.device: 'cuda' is asked for, but torch finds no GPU; use 'auto' or 'cpu'")
    torch.set_num_threads(cpu_threads(runtime))
    keep_freed_memory()
    # Recorded logits must mean the same everywhere: no TensorFloat-32, no choice of algorithm by timing.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device("cuda" if available and runtime.device != "cpu" else "cpu")


def keep_freed_memory() -> None:
    """Let the C library keep memory that is freed, for the next layer of a network.

    It would give megabytes back to the system and ask for them again in every layer, and the system clears them each
    time: a sixth of the time of a small network on a CPU.
    """
    with contextlib.suppress(AttributeError):  # not glibc
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP)
        library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def return_freed_memory() -> None:
    """Give back what was freed, between pieces of work: otherwise a process grows with the number of them."""
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def cpu_threads(runtime: Runtime, processes: int = 1) -> int:
    """Return how many threads each of so many processes side by side may use.

    `runtime.threads`, or else the cores, are shared by them; what the environment says, as OMP_NUM_THREADS, is of each.
    """
    if runtime.threads:
        return max(1, runtime.threads // processes)
    return max(1, min(cores().most // processes, threads().most))


def side_by_side(runtime: Runtime, device: torch.device) -> int:
    """Return how many runs are trained, or shards made, at once by one command: several on a CPU, one on a GPU."""
    return runtime.workers or runtime.threads or cores().most if device.type == "cpu" else 1


@contextlib.contextmanager
def one_cpu_thread() -> Iterator[None]:
    """Compute with one thread, for results that do not depend on how many there are.

    Libraries of linear algebra share small matrix products out among threads, and then round them otherwise.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def search_batch(runtime: Runtime, device: torch.device) -> int:
    """Return samples per batch of the boundary search; large ones make a CPU ask for fresh memory in every layer."""
    return runtime.search_batch or (128 if device.type == "cpu" else 2048)
