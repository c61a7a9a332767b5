"""Networks by name, with normalisation inside, and their weights as safetensors.

Every network takes pixels in [0, 1] and returns logits. Weights files hold the state of the inner network under its
own names, so weights published for a plain network load as they are; what else is needed to rebuild the classifier
(name, image shape, classes, mean, deviation) is in the file's metadata.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, NamedTuple

import safetensors
import torch
from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, ValidationError, model_validator
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import WeightsError
from pipeline.networks import resnet_size
from pipeline.storage import write_atomically

METADATA = "architecture"  # key in the metadata of a weights file


class Architecture(NamedTuple):
    """What is needed to build a classifier: the network's name and the data that it is for.

    `image_shape` is (channels, height, width); `mean` and `std` hold one value per channel, for pixels in [0, 1].
    """

    network: str
    classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (He et al., 2016, option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            x = F.pad(x, (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(residual + x)


class ResNet(nn.Module):
    """The CIFAR ResNet of depth 6n + 2 (He et al., 2016, section 4.2): three groups of n blocks."""

    def __init__(self, depth: int, width: int, channels: int, classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._group(blocks, width, width, 1)
        self.layer2 = self._group(blocks, width, 2 * width, 2)
        self.layer3 = self._group(blocks, 2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _group(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class Classifier(nn.Module):
    """A network with its normalisation: pixels (N, C, H, W) in [0, 1] to logits (N, classes)."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, architecture: Architecture) -> None:
        super().__init__()
        self.network = network
        self.architecture = architecture
        self.register_buffer("mean", torch.tensor(architecture.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(architecture.std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


def build(architecture: Architecture) -> Classifier:
    """Build a classifier with fresh weights, drawn from torch's global generator.

    Names: `resnet<depth>` with depth 6n + 2 (8, 14, 20, 26, ...), optionally `w<channels>` of the first group
    (default 16): `resnet8w4`.

    Raises:
        WeightsError: no network has that name.
    """
    try:
        depth, width = resnet_size(architecture.network)
    except ValueError as error:
        raise WeightsError(f"network '{architecture.network}': {error}") from None
    return Classifier(ResNet(depth, width, architecture.image_shape[0], architecture.classes), architecture)


def save_weights(model: Classifier, path: Path) -> None:
    """Write the network's state and the classifier's architecture to a safetensors file, atomically."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
    # One entry only: safetensors writes several in any order.
    write_atomically(path, save(state, {METADATA: json.dumps(model.architecture._asdict())}))


def load_weights(path: Path, architecture: Architecture | None = None) -> Classifier:
    """Read a classifier from a safetensors file.

    Args:
        path: the file.
        architecture: what the file must fit; by default, what its own metadata says.

    Raises:
        WeightsError: the file is missing, no safetensors file (a pickle, say), or does not fit the architecture.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: not a readable safetensors file ({error}). Pickled weights (.pt, .pth) can run code and are "
            "refused: load them where you trust them, with torch.load(..., weights_only=True), and write the state "
            "dict with safetensors.torch.save_file"
        ) from None
    if architecture is None:
        architecture = _architecture_from(metadata, path)
    model = build(architecture)
    _load_state(model.network, state, path, architecture.network)
    return model


class _Description(BaseModel):
    """An architecture as a stranger's file gives it."""

    network: str
    classes: int = Field(ge=2)
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    mean: list[FiniteFloat]
    std: list[Annotated[FiniteFloat, Field(gt=0)]]

    @model_validator(mode="after")
    def _is_whole(self) -> _Description:
        resnet_size(self.network)
        if not len(self.mean) == len(self.std) == self.image_shape[0]:
            raise ValueError("mean and deviation must have a value for each channel")
        return self


def _architecture_from(metadata: dict[str, str], path: Path) -> Architecture:
    if METADATA not in metadata:
        raise WeightsError(f"{path}: no usable description of its network in the metadata")
    try:
        given = _Description.model_validate_json(metadata[METADATA])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WeightsError(
            f"{path}: no usable description of its network in the metadata: {where}: {first['msg']}"
        ) from None
    return Architecture(given.network, given.classes, given.image_shape, tuple(given.mean), tuple(given.std))


def _load_state(network: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    # Counters of batches are no weights: some exporters leave them out.
    expected = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    given = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    for key in sorted(expected.keys() | given.keys()):
        if key not in given or key not in expected:
            side = "lacks" if key not in given else "has an unknown tensor"
            raise WeightsError(f"{path}: not the weights of {name}: {side} '{key}'")
        if given[key].shape != expected[key].shape:
            raise WeightsError(
                f"{path}: not the weights of {name}: '{key}' has shape {tuple(given[key].shape)}, "
                f"expected {tuple(expected[key].shape)}"
            )
        if not torch.isfinite(given[key]).all():
            raise WeightsError(f"{path}: '{key}' holds values that are not finite")
    network.load_state_dict(given, strict=False)


def folded(model: Classifier) -> Classifier:
    """A frozen copy for inference in which batch norm is part of the convolutions: fewer passes over memory.

    Its logits differ from the model's by rounding only. Of a network that cannot be traced, or whose folded copy
    disagrees, it is a plain copy.
    """
    from torch.fx.experimental.optimization import fuse  # imported here: only searches need it

    device = model.mean.device
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    probe = torch.rand(4, *model.architecture.image_shape, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        fast = Classifier(fuse(plain.network), model.architecture).to(device).eval().requires_grad_(False)
        with torch.no_grad():
            agrees = torch.allclose(fast(probe), plain(probe), rtol=1e-3, atol=1e-3)
    except Exception:  # torch.fx raises all kinds on networks that it cannot trace
        agrees = False
    result = fast if agrees else plain
    return result.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
