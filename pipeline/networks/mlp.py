"""Multilayer perceptrons, for inputs that are no images: of the other networks, none takes two pixels."""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.networks.grouped import linear


class Mlp(nn.Module):
    """Fully connected layers with ReLU between them: `layer1`, `layer2`, ..., then `linear`.

    Several members, each with weights of its own, are computed as one, side by side in the units.
    """

    def __init__(self, layers: int, units: int, pixels: int, classes: int, members: int = 1) -> None:
        super().__init__()
        self.names = [f"layer{number}" for number in range(1, layers + 1)]
        for number, name in enumerate(self.names):
            self.add_module(name, nn.Sequential(linear(units if number else pixels, units, members), nn.ReLU()))
        self.linear = linear(units, classes, members)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for name in self.names:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.linear(x)
        return logits
