"""The processes of one training run, and Lightning Fabric, which connects them."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Literal

import torch

from pipeline.core.errors import ParameterError
from pipeline.core.parameters import Runtime
from pipeline.machine.device import cpu_threads, set_up_device
from pipeline.machine.forks import end_with_parent

if TYPE_CHECKING:
    from lightning_fabric import Fabric


FIRST_PROCESS = "BOUNDARY_FIRST_PROCESS"  # environment: process id of the one that starts the others


class Processes:
    """The processes of one training run: this one alone, those of torchrun, or `runtime.devices` that start here.

    Args:
        runtime: device, how many.
        precision: of training.
    """

    def __init__(self, runtime: Runtime, precision: Literal["32-true", "bf16-mixed"]) -> None:
        self.runtime, self.precision = runtime, precision
        self.device = set_up_device(runtime)
        self.count = int(os.environ.get("WORLD_SIZE", runtime.devices))
        self._fabric: Fabric | None = None
        if self.several:
            self.start()

    def start(self) -> Fabric:
        """Return Lightning Fabric, started when first needed: it takes seconds, and a finished run goes without."""
        if self._fabric is None:
            self._fabric = make_fabric(self.runtime, self.precision)
        return self._fabric

    @property
    def several(self) -> bool:
        return self.count > 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return not self.several or bool(self.start().is_global_zero)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.several:
            self.start().barrier()


def make_fabric(runtime: Runtime, precision: Literal["32-true", "bf16-mixed"]) -> Fabric:
    """Start Lightning Fabric for training: device placement, precision, several processes.

    Under torchrun this process is one of its processes; otherwise `runtime.devices` of them are started.

    Raises:
        ParameterError: there are fewer GPUs than asked for.
    """
    from lightning_fabric import Fabric  # imported here: slow, and only training needs it
    from lightning_fabric.strategies.ddp import DDPStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    device = set_up_device(runtime)
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
        torch.set_num_threads(cpu_threads(runtime, devices))
    return fabric
