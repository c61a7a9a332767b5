"""How long networks take on this machine: a measurement, so no stage's output."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from pydantic import BaseModel

from pipeline.machine.processor import processor
from pipeline.networks.classifier import Classifier
from pipeline.networks.fast import frozen

BATCH = 64  # images
MEASURED = 2.0  # seconds of each measurement, at least


class NetworkLatency(BaseModel):
    """The latency of one network: medians, in seconds."""

    image: float
    """Of one image alone."""
    batch: float
    """Of `BATCH` images."""


class Latency(BaseModel):
    """The latency of networks, and where it was measured."""

    device: str
    threads: int
    """Of the CPU."""
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    networks: dict[str, NetworkLatency]
    """By name of the network."""


def measure_latency(models: Mapping[str, Classifier], device: torch.device) -> Latency:
    """Measure the latency of classifiers, by name, at least one, with the threads that torch has."""
    shape = next(iter(models.values())).architecture.image_shape
    networks = {}
    for name, model in models.items():
        network = frozen(model, device)
        networks[name] = NetworkLatency(image=_median_seconds(network, 1), batch=_median_seconds(network, BATCH))
    return Latency(device=device_name(device), threads=torch.get_num_threads(), image_shape=shape, networks=networks)


def _median_seconds(network: Classifier, rows: int) -> float:
    """Return the median time of a forward pass of so many images, after some that do not count."""
    from torch.utils.benchmark import Timer  # imported here: slow

    names = {"network": network, "images": network.black_images(rows)}
    timer = Timer("network(images)", globals=names, num_threads=torch.get_num_threads())
    with torch.no_grad():
        return timer.blocked_autorange(min_run_time=MEASURED).median


def milliseconds(seconds: float) -> str:
    """Return a time for a table, three digits.

    Example:
        >>> milliseconds(0.000035678), milliseconds(1.5)
        ('0.0357', '1500')
    """
    return np.format_float_positional(1e3 * seconds, precision=3, unique=False, fractional=False, trim="-")


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {processor()}"
