"""The ResNets for small images that the paper uses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.networks.grouped import conv, linear, norm, pad_channels


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (He et al., 2016, option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, members: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, stride, members)
        self.bn1 = norm(out_channels, members)
        self.conv2 = conv(out_channels, out_channels, 1, members)
        self.bn2 = norm(out_channels, members)
        self.stride, self.members = stride, members
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        if self.stride > 1:
            # Every other pixel, as slices would give; but their gradients come in another order of memory.
            x = F.avg_pool2d(x, 1, self.stride)
        if self.new_channels:
            x = pad_channels(x, self.new_channels, self.members)
        return F.relu(residual + x, inplace=True)


class ResNet(nn.Module):
    """The CIFAR ResNet of depth 6n + 2 (He et al., 2016, section 4.2): three groups of n blocks.

    Several members, each with weights of its own, are computed as one, side by side in the channels.
    """

    def __init__(self, depth: int, width: int, channels: int, classes: int, members: int = 1) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = conv(channels, width, 1, members)
        self.bn1 = norm(width, members)
        self.layer1 = self._group(blocks, width, width, 1, members)
        self.layer2 = self._group(blocks, width, 2 * width, 2, members)
        self.layer3 = self._group(blocks, 2 * width, 4 * width, 2, members)
        self.linear = linear(4 * width, classes, members)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _group(blocks: int, in_channels: int, out_channels: int, stride: int, members: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride, members)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1, members) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits
