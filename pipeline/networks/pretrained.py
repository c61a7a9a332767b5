"""Weights that training goes on from: those of a file, or the library's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from pipeline.core.errors import WeightsError
from pipeline.core.text import one_line
from pipeline.networks.classifier import Architecture
from pipeline.networks.template import COUNTER, Template
from pipeline.networks.weights import apart, read_architecture, read_state

LIBRARY = "library"  # in the place of a file: the weights that torchvision or timm has for the network


class Start(NamedTuple):
    """What a network begins with."""

    state: dict[str, Tensor]
    """By name, float32. What is not in it begins as it would without."""
    anew: list[str]
    """Tensors of a classifier for other classes, which are left out."""
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    """What the images were normalised by, for each channel; None where it is not known."""
    digest: str
    """sha256 of names and values."""

    def normalised_as(self, architecture: Architecture) -> Architecture:
        """Return an architecture that normalises images as these weights want them.

        One value for all channels is the mean of theirs, where the numbers of channels differ.
        """
        if self.mean is None or self.std is None:
            return architecture
        channels = architecture.image_shape[0]
        return architecture._replace(mean=_of_channels(self.mean, channels), std=_of_channels(self.std, channels))


def read_start(given: str, architecture: Architecture) -> Start:
    """Read the weights that a network goes on from; its classifier may be one for other classes.

    Args:
        given: path of a safetensors file, or `library`.
        architecture: of the network.

    Raises:
        WeightsError: they cannot be had, or are not of this network.
    """
    network = architecture.network
    means: tuple[float, ...] | None
    stds: tuple[float, ...] | None
    if given == LIBRARY:
        state, means, stds = _of_library(network)
    else:
        state, described = read_state(Path(given)), read_architecture(Path(given))
        means, stds = (described.mean, described.std) if described else (None, None)
    template = Template(network)
    if problem := template.misfit(state):
        raise WeightsError(f"{given}: not weights of {network}: {problem}")
    sizes = template.sizes_of(state)
    known = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    of_classes = {name for name, _ in template.class_axes}
    anew = sorted(of_classes) if sizes.classes != architecture.classes else []
    wanted = template.tensors.keys() - set(anew)
    kept = {name: value for name, value in known.items() if name in wanted or name.endswith(COUNTER)}
    channels = architecture.image_shape[0]
    if sizes.channels not in (None, channels):
        raise WeightsError(
            f"{given}: for images of {sizes.channels} channels, expected {channels}: set dataset.channels"
        )
    return Start(kept, anew, means, stds, hashlib.sha256(save(apart(kept))).hexdigest())


def _of_library(network: str) -> tuple[dict[str, Tensor], tuple[float, ...], tuple[float, ...]]:
    """Return the weights that a library has for a network, and what images are normalised by."""
    library, _, name = network.partition(".")
    if library not in ("torchvision", "timm"):
        raise WeightsError(f"{network}: no library has weights for it: give a safetensors file")
    try:
        return _of_torchvision(name) if library == "torchvision" else _of_timm(name)
    except Exception as error:  # of the network, of the disk, and what the libraries make of both
        raise WeightsError(
            f"{network}: the weights of {library} cannot be had ({type(error).__name__}: {one_line(error)}): without a "
            f"network, give a safetensors file, or put theirs into the cache of {_cache_of(library)}"
        ) from None


def _of_torchvision(name: str) -> tuple[dict[str, Tensor], tuple[float, ...], tuple[float, ...]]:
    from torchvision.models import get_model_weights  # imported here: slow

    weights = get_model_weights(name).DEFAULT
    view: Any = weights.transforms()
    return weights.get_state_dict(check_hash=True, map_location="cpu"), tuple(view.mean), tuple(view.std)


def _of_timm(name: str) -> tuple[dict[str, Tensor], tuple[float, ...], tuple[float, ...]]:
    import timm  # imported here: slow, and optional

    network: Any = timm.create_model(name, pretrained=True)
    return network.state_dict(), tuple(network.pretrained_cfg["mean"]), tuple(network.pretrained_cfg["std"])


def _cache_of(library: str) -> str:
    return (
        f"torch ({Path(torch.hub.get_dir()) / 'checkpoints'})" if library == "torchvision" else "Hugging Face (HF_HOME)"
    )


def _of_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (mean(values),) * channels
