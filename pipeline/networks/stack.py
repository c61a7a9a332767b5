"""Several small networks of one architecture, trained as one: each pass costs a CPU little more than one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.core.network_names import MLP_NAME, RESNET_NAME, resnet_size
from pipeline.networks.classifier import Architecture, Classifier, bare_network

MEMBERS = 4  # a stack has always so many: how a member is rounded may depend on how many there are
FASTEST_BELOW = 256  # width of a ResNet times height of the image: wider ones gain nothing


class Stack(Classifier):
    """Networks with weights of their own, computed as one: pixels (S, N, C, H, W) in [0, 1] to logits (S, N, classes).

    Args:
        members: S networks of one architecture, for which `stacks_well` is true. Their weights are copied.
    """

    def __init__(self, members: Sequence[Classifier]) -> None:
        architecture = members[0].architecture
        super().__init__(bare_network(architecture, len(members)), architecture)
        self.members = len(members)
        self.network.load_state_dict(_joined([member.network.state_dict() for member in members]))

    def forward(self, images: Tensor) -> Tensor:
        normalised = ((images - self.mean) / self.std).transpose(0, 1).flatten(1, 2)
        logits: Tensor = self.network(normalised)
        return logits.view(len(logits), self.members, -1).transpose(0, 1)

    def black_images(self, count: int) -> Tensor:
        return super().black_images(count).expand(self.members, -1, -1, -1, -1)

    def states(self) -> list[dict[str, Tensor]]:
        """Return the state of each member's network, which `load_state_dict` of one takes."""
        whole = self.network.state_dict()
        parts = {
            name: value.chunk(self.members) if value.dim() else [value] * self.members for name, value in whole.items()
        }
        return [{name: part[number].clone() for name, part in parts.items()} for number in range(self.members)]


def members_of(classifier: Classifier) -> int:
    """Return how many networks a classifier is: 1 unless it is a stack."""
    return classifier.members if isinstance(classifier, Stack) else 1


def stacks_well(architecture: Architecture) -> bool:
    """Return whether networks of an architecture can be trained as one, and a CPU then gains by it."""
    name = architecture.network
    if MLP_NAME.fullmatch(name):
        return True
    return bool(RESNET_NAME.fullmatch(name)) and resnet_size(name)[1] * architecture.image_shape[1] < FASTEST_BELOW


def _joined(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the states of members as that of a stack; numbers without dimensions are those of the first one."""
    first = states[0]
    return {name: torch.cat([state[name] for state in states]) if first[name].dim() else first[name] for name in first}
