"""The machine: device and threads. Nothing here decides what is computed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch

from pipeline.config import Runtime
from pipeline.errors import ParameterError
from pipeline.forks import end_with_parent

if TYPE_CHECKING:
    from lightning_fabric import Fabric

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
KEPT_BYTES = 1 << 30  # of memory that is free but may be needed again
LARGEST_FROM_HEAP = 1 << 25  # bytes, the most that glibc takes

FIRST_PROCESS = "BOUNDARY_FIRST_PROCESS"  # environment: process id of the one that starts the others


def choose_device(runtime: Runtime) -> torch.device:
    """The device to compute on, with float32 arithmetic that is exact and repeatable.

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


def cpu_threads(runtime: Runtime) -> int:
    """How many threads this process may use."""
    return runtime.threads or len(os.sched_getaffinity(0))


def side_by_side(runtime: Runtime, device: torch.device) -> int:
    """How many runs are trained, or shards made, at once by one command: several on a CPU, one on a GPU."""
    return runtime.workers or cpu_threads(runtime) if device.type == "cpu" else 1


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
    """Samples per batch of the boundary search; large ones make a CPU ask for fresh memory in every layer."""
    return runtime.search_batch or (128 if device.type == "cpu" else 2048)


class Processes:
    """The processes of one training run: this one alone, those of torchrun, or `runtime.devices` that start here.

    Args:
        runtime: device, how many.
        precision: of training.
    """

    def __init__(self, runtime: Runtime, precision: Literal["32-true", "bf16-mixed"]) -> None:
        self.runtime, self.precision = runtime, precision
        self.device = choose_device(runtime)
        self.count = int(os.environ.get("WORLD_SIZE", runtime.devices))
        if self.several:
            self.fabric  # noqa: B018 (starts them)

    @functools.cached_property
    def fabric(self) -> Fabric:
        """Lightning Fabric; to import it takes seconds, and a run that is finished does not need it."""
        return make_fabric(self.runtime, self.precision)

    @property
    def several(self) -> bool:
        return self.count > 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return not self.several or bool(self.fabric.is_global_zero)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.several:
            self.fabric.barrier()


def make_fabric(runtime: Runtime, precision: Literal["32-true", "bf16-mixed"]) -> Fabric:
    """Lightning Fabric for training: device placement, precision, several processes.

    Under torchrun this process is one of its processes; otherwise `runtime.devices` of them are started.

    Raises:
        ParameterError: there are fewer GPUs than asked for.
    """
    from lightning_fabric import Fabric  # imported here: slow, and only training needs it
    from lightning_fabric.strategies.ddp import DDPStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    device = choose_device(runtime)
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", runtime.devices))
    nodes = int(os.environ.get("WORLD_SIZE", devices)) // devices if "LOCAL_WORLD_SIZE" in os.environ else 1
    if device.type == "cuda" and devices > torch.cuda.device_count():
        raise ParameterError(f"runtime.devices: {devices} GPUs are asked for, torch finds {torch.cuda.device_count()}")
    fabric = Fabric(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=devices,
        num_nodes=nodes,
        # Buffers stay: a step runs the network twice, and batch norm's statistics must not change in between.
        strategy=DDPStrategy(broadcast_buffers=False) if devices * nodes > 1 else "auto",
        precision=precision,
    )
    if devices > 1 and FIRST_PROCESS in os.environ:
        end_with_parent(int(os.environ[FIRST_PROCESS]))
    elif "LOCAL_RANK" not in os.environ:
        os.environ[FIRST_PROCESS] = str(os.getpid())  # for the processes that are about to be started
    fabric.launch()
    os.environ.pop(FIRST_PROCESS, None)
    if device.type == "cpu":
        torch.set_num_threads(max(1, cpu_threads(runtime) // devices))
    return fabric
