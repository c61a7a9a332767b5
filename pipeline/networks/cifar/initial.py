"""Fresh weights."""

from __future__ import annotations

from torch import nn


def initialise_convolutions_(network: nn.Module) -> None:
    """Draw the weights of all convolutions with variance 2 / (k^2 C), C their output channels; biases become zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialise_small_(layer: nn.Linear) -> None:
    """Draw the weights of a classifying layer with standard deviation 0.01; biases become zero."""
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
