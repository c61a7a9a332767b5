"""Networks by name, with normalisation inside: pixels in [0, 1] to logits."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.core.errors import WeightsError
from pipeline.core.extensions import is_own, own_object
from pipeline.core.network_names import check_network, mlp_size, resnet_size
from pipeline.core.text import one_line
from pipeline.images.prepared import Prepared
from pipeline.networks.mlp import Mlp
from pipeline.networks.resnet import ResNet

CHANNELS_LAST_FROM = 8  # channels, on a CPU


class Architecture(NamedTuple):
    """What is needed to build a classifier: the network's name and the data that it is for.

    `image_shape` is (channels, height, width); `mean` and `std` hold one value per channel, for pixels in [0, 1].
    """

    network: str
    classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Classifier(nn.Module):
    """A network with its normalisation: pixels (N, C, H, W) in [0, 1] to logits (N, classes)."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, architecture: Architecture, channels: int | None = None) -> None:
        super().__init__()
        self.network = network
        self.architecture = architecture
        self.channels = channels or architecture.image_shape[0]  # that the network takes; gray images are repeated
        self.register_buffer("mean", torch.tensor(architecture.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(architecture.std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        normalised = ((images - self.mean) / self.std).expand(-1, self.channels, -1, -1)
        logits: Tensor = self.network(normalised)
        return logits

    def black_images(self, count: int) -> Tensor:
        """Return so many images that it takes, on its device."""
        return torch.zeros(count, *self.architecture.image_shape, device=self.mean.device)


def build(architecture: Architecture) -> Classifier:
    """Build a classifier with fresh weights, drawn from torch's global generator.

    Networks of torchvision get gray images as three equal channels; timm's and the user's are made for the channels of
    the images. The user's `own.<module>.<function>` is called as f(channels, classes, image_shape) and returns a module
    from normalised images (N, C, H, W) to logits (N, classes).

    Raises:
        WeightsError: no network has that name, or it does not take images of that size.

    Example:
        >>> model = build(Architecture("resnet8w4", classes=10, image_shape=(1, 8, 8), mean=(0.3,), std=(0.4,)))
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    name = architecture.network
    network = bare_network(architecture)
    if not (is_own(name) or name.startswith(("cifar.", "torchvision.", "timm."))):
        return Classifier(network, architecture)
    return _checked(Classifier(network, architecture, 3 if name.startswith("torchvision.") else None))


def bare_network(architecture: Architecture, members: int = 1) -> nn.Module:
    """Build the network of an architecture alone: no normalisation, and not tried on an image.

    Args:
        architecture: whose network.
        members: of a perceptron or a ResNet of this project, so many computed as one.

    Raises:
        WeightsError: no network has that name, or it cannot be built so.
    """
    name, classes = architecture.network, architecture.classes
    channels = architecture.image_shape[0]
    try:
        check_network(name)
    except ValueError as error:
        raise WeightsError(f"network '{name}': {error}") from None
    if is_own(name):
        try:
            own = own_object(name)(channels, classes, architecture.image_shape)
        except Exception as error:  # the user's code may raise anything
            raise WeightsError(f"network '{name}': {type(error).__name__}: {one_line(error)}") from error
        if not isinstance(own, nn.Module):
            raise WeightsError(f"network '{name}': expected a torch module, got a {type(own).__name__}")
        return own
    library, _, plain_name = name.partition(".")
    if library == "cifar":
        from pipeline.networks.cifar.table import CIFAR_NETWORKS  # imported here: torchvision is slow

        return CIFAR_NETWORKS[plain_name](channels, classes)
    if library == "torchvision":
        return _from_torchvision(plain_name, classes)
    if library == "timm":
        import timm  # imported here: slow, and optional

        try:
            network: nn.Module = timm.create_model(plain_name, pretrained=False, num_classes=classes, in_chans=channels)
        except (RuntimeError, TypeError, ValueError) as error:
            raise WeightsError(f"network '{name}': {one_line(error)}") from None
        return network
    if layers := mlp_size(name):
        return Mlp(*layers, prod(architecture.image_shape), classes, members)
    return ResNet(*resnet_size(name), channels, classes, members)


def _from_torchvision(name: str, classes: int) -> nn.Module:
    from torchvision.models import get_model  # imported here: slow

    # Two networks return more than logits in training unless told otherwise.
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = get_model(name, weights=None, num_classes=classes, **options)
    return network


def _checked(classifier: Classifier) -> Classifier:
    """Return a classifier, refused when its network cannot take its images."""
    architecture = classifier.architecture
    height, width = architecture.image_shape[1:]
    try:
        with torch.no_grad():
            shape = tuple(classifier.eval()(torch.zeros(1, *architecture.image_shape)).shape)
    except Exception as error:  # networks raise all kinds on images that they do not take
        reason = one_line(error)
        raise WeightsError(
            f"network '{architecture.network}' does not take images of {height}x{width} and give logits ({reason}): "
            "set dataset.image_size, or take another network; one of your own gives one tensor (N, classes), float32"
        ) from None
    if shape != (1, architecture.classes):
        raise WeightsError(f"network '{architecture.network}' is no classifier: its output has shape {shape}")
    return classifier.train()


def move_to_(model: Classifier, device: torch.device, half: bool = False) -> Classifier:
    """Move the model itself to a device, its weights in the order that computes fastest there.

    On a CPU that is channels last, except for networks with very few channels, or whose code cannot take it: 1.2 to 2.5
    times as fast. On a GPU it is channels last in half precision, which its tensor cores want.

    Args:
        model: what to move.
        device: where it will compute.
        half: its convolutions compute in half precision.
    """
    channels = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    if channels and (min(channels) >= CHANNELS_LAST_FROM if device.type == "cpu" else half):
        channels_last_(model)
    return model.to(device)


@torch.no_grad()
def channels_last_(model: Classifier) -> bool:
    """Order the weights of the model itself with channels last, unless its code then fails, as `view` of maps does.

    Returns:
        Whether they are in that order.
    """
    training, images = model.training, model.black_images(2)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        model.eval()(images)
    except RuntimeError:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return False
    finally:
        model.train(training)
    return True


def architecture_for(network: str, data: Prepared) -> Architecture:
    """Return the architecture of a named network for a dataset."""
    return Architecture(network, len(data.class_names), data.view_shape, data.mean, data.std)
