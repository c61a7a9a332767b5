"""ShuffleNet (Zhang et al., 2018) and ShuffleNetV2 (Ma et al., 2018), from a 1x1 convolution without pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIRST = 24  # channels of the first convolution
GROUPS = 3  # of the 1x1 convolutions of the first network


class GroupedUnit(nn.Module):
    """Grouped 1x1, shuffle, 3x3 on each channel, grouped 1x1, with a quarter of the channels between.

    With stride 2, the shortcut is an average pooling, whose channels come behind those of the convolutions; else it is
    added. The first convolution of the network's first unit has one group.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        made = out_channels - in_channels if stride > 1 else out_channels
        width, groups = made // 4, 1 if in_channels == FIRST else GROUPS
        self.conv1 = nn.Conv2d(in_channels, width, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.shuffle = nn.ChannelShuffle(groups)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, made, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(made)
        self.pool = nn.AvgPool2d(3, stride, padding=1) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        made = self.shuffle(F.relu(self.bn1(self.conv1(x)), inplace=True))
        made = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(made)), inplace=True)))
        made = made + x if self.pool is None else torch.cat([made, self.pool(x)], 1)
        return F.relu(made, inplace=True)


def grouped_stage(units: int, in_channels: int, out_channels: int) -> nn.Sequential:
    """Return units in a row, of which the first has stride 2."""
    first = GroupedUnit(in_channels, out_channels, 2)
    return nn.Sequential(first, *(GroupedUnit(out_channels, out_channels, 1) for _ in range(units - 1)))


class CifarShuffleNetV1(nn.Module):
    """Three stages of 4, 8 and 4 units, to 240, 480 and 960 channels; an image of 32x32 ends as maps of 4x4."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, FIRST, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(FIRST)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = grouped_stage(4, FIRST, 240)
        self.layer2 = grouped_stage(8, 240, 480)
        self.layer3 = grouped_stage(4, 480, 960)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(960, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.flatten(self.avgpool(x), 1))
        return logits


class SplitUnit(nn.Module):
    """The second half of the channels passes 1x1, 3x3 on each channel and 1x1; then all are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        kept, made = x.chunk(2, 1)
        made = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(made)), inplace=True)))
        made = F.relu(self.bn3(self.conv3(made)), inplace=True)
        shuffled: Tensor = self.shuffle(torch.cat([kept, made], 1))
        return shuffled


class DownUnit(nn.Module):
    """Two branches of stride 2 on all channels, each to half of the new ones; then all are shuffled.

    The first branch is 3x3 on each channel (`conv1`) and 1x1; the second is 1x1 (`conv3`), 3x3 on each channel and 1x1.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 2, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))), inplace=True)
        second = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)), inplace=True)))
        second = F.relu(self.bn5(self.conv5(second)), inplace=True)
        shuffled: Tensor = self.shuffle(torch.cat([first, second], 1))
        return shuffled


def split_stage(units: int, in_channels: int, out_channels: int) -> nn.Sequential:
    """Return units in a row, of which the first has stride 2."""
    return nn.Sequential(DownUnit(in_channels, out_channels), *(SplitUnit(out_channels) for _ in range(units - 1)))


class CifarShuffleNetV2(nn.Module):
    """Three stages of 4, 8 and 4 units, to 116, 232 and 464 channels, then 1x1 to 1,024; 32x32 ends as 4x4."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, FIRST, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(FIRST)
        self.layer1 = split_stage(4, FIRST, 116)
        self.layer2 = split_stage(8, 116, 232)
        self.layer3 = split_stage(4, 232, 464)
        self.conv2 = nn.Conv2d(464, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        logits: Tensor = self.linear(torch.flatten(self.avgpool(x), 1))
        return logits
