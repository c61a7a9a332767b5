"""What a network costs, on any machine: parameters, multiply-adds and bytes follow from the network alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import BaseModel

from pipeline.machine.device import one_cpu_thread
from pipeline.networks.classifier import Classifier
from pipeline.networks.fast import frozen


class Costs(BaseModel):
    """The costs of a network."""

    parameters: int
    """Trained values; running statistics of batch norm do not count."""
    multiply_adds: int
    """Of one image, in convolutions and products of matrices; sums, activations and norms do not count."""
    bytes: int
    """Of its weights file."""


def costs_of(model: Classifier, weights: Path) -> Costs:
    """Return the costs of a classifier on the CPU, and of the file that its weights are from."""
    return Costs(
        parameters=sum(each.numel() for each in model.parameters()),
        multiply_adds=multiply_adds(model),
        bytes=weights.stat().st_size,
    )


@one_cpu_thread()
def multiply_adds(model: Classifier) -> int:
    """Return the multiply-adds of one image: half of the floating point operations that torch counts."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode  # imported here: slow

    still = frozen(model, torch.device("cpu"))  # the counter follows gradients, which some networks hide from it
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _plain_attention(), sdpa_kernel(SDPBackend.MATH), counter:
        still(model.black_images(1))
    return int(counter.get_total_flops()) // 2


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Let attention be products of matrices, which are counted; its fused kernels are not."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
