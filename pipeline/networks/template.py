"""The tensors of a network at any number of classes, and whether given ones are its own: by names, shapes and types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.core.errors import WeightsError
from pipeline.networks.classifier import Architecture, bare_network

COUNTER = "num_batches_tracked"  # ends the names of what is no weight: some exporters leave it out
CLASSES, OTHER_CLASSES = 7, 11  # numbers that are compared to see which axes follow the classes
SHAPE, GRAY, LARGER = (3, 64, 64), (1, 64, 64), (3, 96, 96)  # likewise for channels and image size

Axes = set[tuple[str, int]]
"""Names of tensors with one of their axes."""


class Sizes(NamedTuple):
    """For how many classes weights are, and for images of how many channels; None where no tensor tells."""

    classes: int | None
    channels: int | None


class Template:
    """The tensors that a named network has, and which of their axes follow classes, channels and image size.

    The network is built a few times at different sizes, without memory for its values where that works.

    Raises:
        WeightsError: no network has that name, or it cannot be built.
    """

    def __init__(self, network: str) -> None:
        self.network = network
        self.tensors = _tensors(network, CLASSES, SHAPE)
        self.class_axes = self._following(_tensors(network, OTHER_CLASSES, SHAPE), CLASSES, OTHER_CLASSES)
        self.channel_axes = self._following(_tensors(network, CLASSES, GRAY), SHAPE[0], GRAY[0])

    def _following(self, other: Mapping[str, Tensor], here: int, there: int) -> Axes:
        return {
            (name, axis)
            for name in self.tensors.keys() & other.keys()
            for axis, sizes in enumerate(zip(self.tensors[name].shape, other[name].shape, strict=False))
            if sizes == (here, there)
        }

    def sizes_of(self, given: Mapping[str, Tensor]) -> Sizes:
        """Return classes and channels of tensors that bear this network's names."""
        return Sizes(*(_size_at(axes, given) for axes in (self.class_axes, self.channel_axes)))

    def misfit(self, given: Mapping[str, Tensor]) -> str | None:
        """Return why tensors are not this network's at any number of classes and any image size; None if they are.

        Only those are looked at that bear its names; counters may be missing.
        """
        for name in sorted(self.tensors):
            if name not in given:
                return f"lacks '{name}'"
        classes, channels = self.sizes_of(given)
        if classes is None:
            return "no axis of its tensors follows the number of classes"
        channels = channels or SHAPE[0]
        here = _tensors(self.network, classes, (channels, *SHAPE[1:]))
        larger = _tensors(self.network, classes, (channels, *LARGER[1:]))
        for name in sorted(here):
            expected, shape = here[name].shape, given[name].shape
            free = [one != other for one, other in zip(expected, larger[name].shape, strict=True)]
            if len(shape) != len(expected) or any(
                one != other and not any_size for one, other, any_size in zip(shape, expected, free, strict=True)
            ):
                return f"'{name}' has shape {tuple(shape)}, expected {tuple(expected)}"
            if (problem := type_problem(here[name], given[name])) is not None:
                return f"'{name}' {problem}"
        return None


def type_problem(expected: Tensor, given: Tensor) -> str | None:
    """Return what is wrong with the type of a tensor for the place of another one; None if it can be cast."""
    kind = str(given.dtype).removeprefix("torch.")
    if given.layout != torch.strided:
        return f"is not plain ({str(given.layout).removeprefix('torch.')}): save it as a dense tensor"
    if given.is_meta:
        return "has a shape, but no values"
    if expected.is_floating_point() and not given.is_floating_point():
        return f"holds {kind}, expected float32: quantised weights are not read, save those of the plain network"
    return None


def other_sizes(architecture: Architecture, given: Mapping[str, Tensor]) -> str | None:
    """Return for what tensors are, if they are of the same network for other data; None if they are not of it."""
    try:
        template = Template(architecture.network)
    except WeightsError:
        return None
    if template.misfit(given) is not None:
        return None
    sizes, channels = template.sizes_of(given), architecture.image_shape[0]
    if sizes.classes != architecture.classes:
        return (
            f"for {sizes.classes} classes, expected {architecture.classes}: prepare the dataset that the network was "
            "trained for, or have the classes picked by name: python -m stages.teacher convert --classes"
        )
    if sizes.channels not in (None, channels):
        return f"for images of {sizes.channels} channels, expected {channels}: set dataset.channels"
    return f"for images of another size than {'x'.join(map(str, architecture.image_shape[1:]))}: set dataset.image_size"


def _size_at(axes: Axes, given: Mapping[str, Tensor]) -> int | None:
    sizes = (given[name].shape[axis] for name, axis in sorted(axes) if name in given and axis < given[name].ndim)
    return next(sizes, None)


def _tensors(network: str, classes: int, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Return the tensors of a network by name, without counters; they may have no values."""
    channels = image_shape[0]
    architecture = Architecture(network, classes, image_shape, (0.0,) * channels, (1.0,) * channels)
    try:
        with torch.device("meta"):
            built = bare_network(architecture)
    except Exception:  # of the user's code and timm's, some computes with values while it builds
        built = bare_network(architecture)
    return {name: tensor for name, tensor in built.state_dict().items() if not name.endswith(COUNTER)}
