"""The networks by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from pipeline.networks.cifar.mobilenet import CifarMobileNetV2
from pipeline.networks.cifar.resnet import CifarResNet, CifarResNet50
from pipeline.networks.cifar.shufflenet import CifarShuffleNetV1, CifarShuffleNetV2
from pipeline.networks.cifar.vgg import CifarVgg
from pipeline.networks.cifar.wide_resnet import WideResNet

NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)

CIFAR_NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth, NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(CifarResNet, depth, WIDE) for depth in (8, 32)},
    "resnet50": CifarResNet50,
    **{f"wrn_{depth}_{widening}": partial(WideResNet, depth, widening) for depth in (16, 40) for widening in (1, 2)},
    "vgg8": partial(CifarVgg, (1, 1, 1, 1, 1)),
    "vgg11": partial(CifarVgg, (1, 1, 2, 2, 2)),
    "vgg13": partial(CifarVgg, (2, 2, 2, 2, 2)),
    "mobilenetv2": CifarMobileNetV2,
    "shufflenetv1": CifarShuffleNetV1,
    "shufflenetv2": CifarShuffleNetV2,
}
"""From channels and classes to a network."""
