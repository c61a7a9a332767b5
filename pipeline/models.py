"""Networks by name, with normalisation inside: pixels in [0, 1] to logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from pipeline.errors import WeightsError
from pipeline.mlp import Mlp
from pipeline.networks import check_network, mlp_size, resnet_size
from pipeline.resnet import ResNet

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


def build(architecture: Architecture) -> Classifier:
    """Build a classifier with fresh weights, drawn from torch's global generator.

    Networks of torchvision get gray images as three equal channels; timm's are made for the channels of the images.

    Raises:
        WeightsError: no network has that name, or it does not take images of that size.

    Example:
        >>> model = build(Architecture("resnet8w4", classes=10, image_shape=(1, 8, 8), mean=(0.3,), std=(0.4,)))
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    name, classes = architecture.network, architecture.classes
    channels = architecture.image_shape[0]
    try:
        check_network(name)
    except ValueError as error:
        raise WeightsError(f"network '{name}': {error}") from None
    library, _, plain_name = name.partition(".")
    if library == "torchvision":
        return _checked(Classifier(_from_torchvision(plain_name, classes), architecture, 3))
    if library == "timm":
        import timm  # imported here: slow, and optional

        try:
            network = timm.create_model(plain_name, pretrained=False, num_classes=classes, in_chans=channels)
        except (RuntimeError, TypeError, ValueError) as error:
            raise WeightsError(f"network '{name}': {' '.join(str(error).split())}") from None
        return _checked(Classifier(network, architecture))
    if layers := mlp_size(name):
        return Classifier(Mlp(*layers, prod(architecture.image_shape), classes), architecture)
    return Classifier(ResNet(*resnet_size(name), channels, classes), architecture)


def _from_torchvision(name: str, classes: int) -> nn.Module:
    from torchvision.models import get_model  # imported here: slow

    # Two networks return more than logits in training unless told otherwise.
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = get_model(name, weights=None, num_classes=classes, **options)
    return network


def _checked(classifier: Classifier) -> Classifier:
    """A classifier, refused when its network cannot take its images."""
    architecture = classifier.architecture
    height, width = architecture.image_shape[1:]
    try:
        with torch.no_grad():
            shape = tuple(classifier.eval()(torch.zeros(1, *architecture.image_shape)).shape)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise WeightsError(
            f"network '{architecture.network}' does not take images of {height}x{width} ({reason}): set "
            "dataset.image_size, or take another network"
        ) from None
    if shape != (1, architecture.classes):
        raise WeightsError(f"network '{architecture.network}' is no classifier: its output has shape {shape}")
    return classifier.train()


def placed(model: Classifier, device: torch.device) -> Classifier:
    """The model itself, moved to a device, with its weights in the order that computes fastest there.

    On a CPU that is channels last, except for networks with very few channels: 1.2 to 2.5 times as fast.
    """
    channels = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    if device.type == "cpu" and channels and min(channels) >= CHANNELS_LAST_FROM:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(device)


def folded(model: Classifier) -> Classifier:
    """A frozen copy for inference in which batch norm is part of the convolutions: fewer passes over memory.

    Its logits differ from the model's by rounding only. Of a network that cannot be traced, or whose folded copy
    disagrees, it is a plain copy.
    """
    from torch.fx.experimental.optimization import fuse  # imported here: only searches need it

    plain = copy.deepcopy(model).eval().requires_grad_(False)
    device = model.mean.device
    fast = _if_it_agrees(
        lambda: Classifier(fuse(plain.network), model.architecture, model.channels).to(device), plain, 1e-3
    )
    return fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _if_it_agrees(make: Callable[[], Classifier], plain: Classifier, tolerance: float) -> Classifier:
    """A faster network, frozen for evaluation, if it can be made and its logits are nearly those of the plain one."""
    shape, generator = plain.architecture.image_shape, torch.Generator().manual_seed(0)
    probe = torch.rand(4, *shape, generator=generator).to(plain.mean.device)
    try:
        fast = make().eval().requires_grad_(False)
        with torch.no_grad():
            expected = plain(probe)
            error = (fast(probe) - expected).norm() / (1 + expected.norm())
    except Exception:  # torch.fx and networks that cannot be changed raise all kinds
        return plain
    return fast if error <= tolerance else plain


def halved(model: Classifier) -> Classifier:
    """A copy of a folded network that computes in bfloat16 between its first and its last layer, for gradients.

    About twice as fast where the machine has instructions for it. Pixels and logits stay float32: a small perturbation
    would be lost in rounded pixels. Of a network that cannot be split so, or on another machine, it is the model.
    """
    if not _has_bfloat16(model.mean.device):
        return model
    return _if_it_agrees(lambda: Classifier(_halved(model.network), model.architecture, model.channels), model, 0.1)


def _halved(network: nn.Module) -> nn.Module:
    if not isinstance(network, fx.GraphModule):
        raise TypeError("the network could not be traced")
    network = copy.deepcopy(network).to(torch.bfloat16)
    graph = network.graph
    (pixels,) = (node for node in graph.nodes if node.op == "placeholder")
    (last,) = next(node for node in graph.nodes if node.op == "output").args
    for node in (*pixels.users, last):
        if not list(network.get_submodule(node.target).float().parameters()):  # raises if it is no module
            raise TypeError(f"'{node.target}' is no layer")
    with graph.inserting_before(last):
        last.update_arg(0, graph.call_method("float", last.args))
    for node in pixels.users:
        with graph.inserting_after(node):
            rounded = graph.call_method("bfloat16", (node,))
        node.replace_all_uses_with(rounded, lambda user, rounded=rounded: user is not rounded)
    network.recompile()
    return network


def _has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
