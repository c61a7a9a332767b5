"""Layers of networks that are several of one architecture at once: members side by side in the channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(in_channels: int, out_channels: int, stride: int, members: int) -> nn.Conv2d:
    """Return a 3x3 convolution without bias, from and to so many channels of each member."""
    channels = members * in_channels, members * out_channels
    return nn.Conv2d(*channels, 3, stride, padding=1, bias=False, groups=members)


def norm(channels: int, members: int) -> nn.BatchNorm2d:
    """Return batch norm of so many channels of each member."""
    return nn.BatchNorm2d(members * channels)


def linear(in_features: int, out_features: int, members: int) -> nn.Module:
    """Return a fully connected layer with bias, from and to so many features of each member."""
    return nn.Linear(in_features, out_features) if members == 1 else GroupedLinear(in_features, out_features, members)


def pad_channels(x: Tensor, new: int, members: int) -> Tensor:
    """Return maps (N, members * C, H, W) with so many new channels of zeros behind those of each member."""
    if members == 1:
        return F.pad(x, (0, 0, 0, 0, 0, new))
    return F.pad(x.view(len(x), members, -1, *x.shape[2:]), (0, 0, 0, 0, 0, new)).flatten(1, 2)


class GroupedLinear(nn.Module):
    """Fully connected layers side by side: (N, members * in_features) to (N, members * out_features).

    The weights of the members follow each other: `weight` (members * out_features, in_features), `bias` likewise. They
    are to be loaded, and begin with zeros.
    """

    def __init__(self, in_features: int, out_features: int, members: int) -> None:
        super().__init__()
        self.members = members
        self.weight = nn.Parameter(torch.zeros(members * out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(members * out_features))

    def forward(self, x: Tensor) -> Tensor:
        each = x.view(len(x), self.members, -1).transpose(0, 1)
        weight = self.weight.view(self.members, -1, x.shape[1] // self.members).transpose(1, 2)
        return torch.baddbmm(self.bias.view(self.members, 1, -1), each, weight).transpose(0, 1).flatten(1)
