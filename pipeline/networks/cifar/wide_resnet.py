"""Wide residual networks (Zagoruyko and Komodakis, 2016), without dropout."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.networks.cifar.initial import initialise_convolutions_


class WideBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions (He et al., 2016: pre-activation).

    Where the number of channels changes, the shortcut begins behind the first ReLU; else at the input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x), inplace=True)
        residual = self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + residual  # type: ignore[no-any-return]


def wide_group(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Return blocks in a row within `layer`, of which the first has the stride."""
    first = WideBlock(in_channels, out_channels, stride)
    rest = (WideBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(OrderedDict(layer=nn.Sequential(first, *rest)))


class WideResNet(nn.Module):
    """A wide ResNet of depth 6n + 4: three groups of n blocks, with 16, 32 and 64 times `widening` channels."""

    def __init__(self, depth: int, widening: int, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        blocks = (depth - 4) // 6
        self.block1 = wide_group(blocks, 16, 16 * widening, 1)
        self.block2 = wide_group(blocks, 16 * widening, 32 * widening, 2)
        self.block3 = wide_group(blocks, 32 * widening, 64 * widening, 2)
        self.bn1 = nn.BatchNorm2d(64 * widening)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * widening, classes)
        initialise_convolutions_(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.relu(self.bn1(x))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits
