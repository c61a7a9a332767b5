"""ResNets whose shortcuts have weights (He et al., 2016, option B), unlike those of pipeline/networks/resnet.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from pipeline.networks.cifar.initial import initialise_convolutions_


def shortcut_of(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Return a 1x1 convolution with batch norm, or None where input and output have one shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def basic_group(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Return basic blocks in a row, of which the first has the stride."""
    first = BasicBlock(in_channels, out_channels, stride, shortcut_of(in_channels, out_channels, stride))
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)))


class CifarResNet(nn.Module):
    """A ResNet of depth 6n + 2: three groups of n basic blocks.

    Args:
        depth: 8, 14, 20, ...
        widths: channels of the first convolution and of the three groups.
        channels: of the images.
        classes: how many.
    """

    def __init__(self, depth: int, widths: Sequence[int], channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        blocks = (depth - 2) // 6
        self.layer1 = basic_group(blocks, widths[0], widths[1], 1)
        self.layer2 = basic_group(blocks, widths[1], widths[2], 2)
        self.layer3 = basic_group(blocks, widths[2], widths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride and 1x1 convolutions, the last to four times the channels.

    It computes as torchvision's, whose shortcut has another name.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = shortcut_of(in_channels, 4 * width, stride) or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = F.relu(self.bn2(self.conv2(residual)), inplace=True)
        return F.relu(self.bn3(self.conv3(residual)) + self.shortcut(x), inplace=True)


def bottleneck_group(blocks: int, in_channels: int, width: int, stride: int) -> nn.Sequential:
    """Return bottlenecks in a row, of which the first has the stride."""
    first = Bottleneck(in_channels, width, stride)
    return nn.Sequential(first, *(Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))


class CifarResNet50(nn.Module):
    """The ResNet-50 with a 3x3 convolution and no pooling in front of its four groups of bottlenecks."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = bottleneck_group(3, 64, 64, 1)
        self.layer2 = bottleneck_group(4, 256, 128, 2)
        self.layer3 = bottleneck_group(6, 512, 256, 2)
        self.layer4 = bottleneck_group(3, 1024, 512, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(2048, classes)
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(torch.flatten(self.avgpool(x), 1))
        return logits
