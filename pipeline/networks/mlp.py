"""Multilayer perceptrons, for inputs that are no images: of the other networks, none takes two pixels."""

from __future__ import annotations

from torch import Tensor, nn


class Mlp(nn.Module):
    """Fully connected layers with ReLU between them: `layer1`, `layer2`, ..., then `linear`."""

    def __init__(self, layers: int, units: int, pixels: int, classes: int) -> None:
        super().__init__()
        self.names = [f"layer{number}" for number in range(1, layers + 1)]
        for number, name in enumerate(self.names):
            self.add_module(name, nn.Sequential(nn.Linear(units if number else pixels, units), nn.ReLU()))
        self.linear = nn.Linear(units, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for name in self.names:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.linear(x)
        return logits
