"""What a classifier makes its logits of: the input of its last linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pipeline.core.errors import ParameterError
from pipeline.networks.classifier import Classifier

PENULTIMATE = "penultimate"  # in the place of a layer's name


def penultimate_size(classifier: Classifier) -> int:
    """Return how many penultimate features (D) a classifier has; errors are those of `last_linear`."""
    return last_linear(classifier).in_features


@contextmanager
def penultimate_features(classifier: Classifier) -> Iterator[list[Tensor]]:
    """Yield the penultimate features (N, D) of the passes of a network within the block, in turn.

    They are the input of the last `nn.Linear` among its modules: pooled, behind the activation.

    Raises:
        ParameterError: the network has no linear layer, or the last one's input is not one vector for each image.
    """
    layer, name, found = last_linear(classifier), classifier.architecture.network, list[Tensor]()

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs[0].ndim != 2:
            raise ParameterError(
                f"network '{name}': the input of its last linear layer is {tuple(inputs[0].shape)}, not one vector for "
                "each image: it has no penultimate features"
            )
        found.append(inputs[0])

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def last_linear(classifier: Classifier) -> nn.Linear:
    """Return the layer that makes the logits.

    Raises:
        ParameterError: the network has no linear layer.
    """
    layers = [module for module in classifier.network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ParameterError(
            f"network '{classifier.architecture.network}': has no linear layer, so it has no penultimate features"
        )
    return layers[-1]
