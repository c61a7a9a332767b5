"""VGG with batch norm and one linear layer (Simonyan and Zisserman, 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from pipeline.networks.cifar.initial import initialise_convolutions_, initialise_small_

WIDTHS = (64, 128, 256, 512, 512)  # channels of the five blocks
POOLED = 3  # blocks with a pooling behind them: the last two both see 4x4 maps of an image of 32x32


class CifarVgg(nn.Module):
    """Five blocks of 3x3 convolutions with biases; the ReLU behind a block is a layer of its own, `relu0` to `relu4`.

    Args:
        depths: convolutions of each block.
        channels: of the images, which have at least 8x8 pixels.
        classes: how many.
    """

    def __init__(self, depths: Sequence[int], channels: int, classes: int) -> None:
        super().__init__()
        for number, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True)):
            widths = [channels] + depth * [width]
            layers = [layer for sizes in pairwise(widths) for layer in Conv2dNormActivation(*sizes, bias=True)]
            self.add_module(f"block{number}", nn.Sequential(*layers[:-1]))
            self.add_module(f"relu{number}", layers[-1])
            channels = width
        self.pool = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        initialise_convolutions_(self)
        initialise_small_(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        for number in range(len(WIDTHS)):
            x = self.get_submodule(f"relu{number}")(self.get_submodule(f"block{number}")(x))
            if number < POOLED:
                x = self.pool(x)
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(x), 1))
        return logits
