"""The machine: device and threads. Nothing here decides what is computed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import torch

from pipeline.config import Runtime
from pipeline.errors import ParameterError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def choose_device(runtime: Runtime) -> torch.device:
    """The device to compute on, with float32 arithmetic that is exact and repeatable.

    Raises:
        ParameterError: a GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if runtime.device == "cuda" and not available:
        raise ParameterError("runtime.device: 'cuda' is asked for, but torch finds no GPU; use 'auto' or 'cpu'")
    torch.set_num_threads(cpu_threads(runtime))
    # Recorded logits must mean the same everywhere: no TensorFloat-32, no choice of algorithm by timing.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device("cuda" if available and runtime.device != "cpu" else "cpu")


def cpu_threads(runtime: Runtime) -> int:
    """How many threads this process may use."""
    return runtime.threads or len(os.sched_getaffinity(0))


def make_fabric(runtime: Runtime, precision: Literal["32-true", "bf16-mixed"]) -> Fabric:
    """Lightning Fabric for training: device placement, precision, several processes."""
    from lightning_fabric import Fabric  # imported here: slow, and only training needs it

    device = choose_device(runtime)
    fabric = Fabric(accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, precision=precision)
    fabric.launch()
    return fabric
