"""MobileNetV2 (Sandler et al., 2018) of half the width, with ReLU in the place of ReLU6."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from pipeline.networks.cifar.initial import initialise_convolutions_, initialise_small_

# Expansion, channels, blocks and stride of the first: table 2 of the paper with half the channels. The first
# convolution and three stages have stride 2, that of the second stage is 1.
STAGES = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))
FIRST, LAST = 16, 1280  # channels around the stages; the last ones are not halved


class InvertedResidual(nn.Module):
    """1x1 to more channels, 3x3 on each channel, 1x1 back without ReLU; a shortcut where the shape is kept.

    It has an expanding convolution even where the expansion is 1.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = expansion * in_channels
        self.conv = nn.Sequential(
            *Conv2dNormActivation(in_channels, width, 1),
            *Conv2dNormActivation(width, width, 3, stride, groups=width),
            *Conv2dNormActivation(width, out_channels, 1, activation_layer=None),
        )
        self.keeps_shape = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.conv(x)
        return x + residual if self.keeps_shape else residual


class CifarMobileNetV2(nn.Module):
    """Seven stages of inverted residuals, `blocks.0` to `blocks.6`; an image of 32x32 ends as maps of 2x2."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = Conv2dNormActivation(channels, FIRST, 3, stride=2)
        self.blocks = nn.Sequential()
        before = FIRST
        for expansion, width, blocks, stride in STAGES:
            first = InvertedResidual(before, width, stride, expansion)
            rest = (InvertedResidual(width, width, 1, expansion) for _ in range(blocks - 1))
            self.blocks.append(nn.Sequential(first, *rest))
            before = width
        self.conv2 = Conv2dNormActivation(before, LAST, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        linear = nn.Linear(LAST, classes)
        self.classifier = nn.Sequential(linear)
        initialise_convolutions_(self)
        initialise_small_(linear)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.blocks(self.conv1(x)))
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(x), 1))
        return logits
