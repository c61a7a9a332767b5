"""What a model says of images, and how often it is right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.images.pixels import pixels
from pipeline.images.prepared import Prepared

PREDICTION_PIXELS = 256 * 32 * 32  # of a batch: larger ones make a CPU ask for fresh memory in every layer


def rows_of_a_batch(image_shape: Sequence[int]) -> int:
    """Return how many images (C, H, W) make a batch, on any device."""
    return min(1024, max(1, PREDICTION_PIXELS // (image_shape[1] * image_shape[2])))


@torch.no_grad()
def predict(model: nn.Module, images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Return logits (N, classes) on the device, of uint8 images (N, C, H, W), with the model in evaluation mode."""
    model.eval()
    rows = rows_of_a_batch(images.shape[1:])
    return torch.cat([model(pixels(batch.to(device))) for batch in torch.split(torch.from_numpy(images), rows)])


def accuracy(model: nn.Module, data: Prepared, device: torch.device) -> float:
    """Return the fraction of a split that a model classifies correctly."""
    return accuracy_of(predict(model, data.images, device).cpu(), torch.from_numpy(data.labels))


def accuracies(model: nn.Module, members: int, data: Prepared, device: torch.device) -> list[float]:
    """Return what fraction of a split each member of a `Stack`, or a single network, classifies correctly."""
    if members == 1:
        return [accuracy(model, data, device)]
    logits = predict(_OfAllMembers(model, members), data.images, device).transpose(0, 1)
    return [accuracy_of(each, torch.from_numpy(data.labels)) for each in logits.cpu()]


class _OfAllMembers(nn.Module):
    """A stack that is shown the same images (N, C, H, W) for each of its S members: logits (N, S, classes)."""

    def __init__(self, stack: nn.Module, members: int) -> None:
        super().__init__()
        self.stack, self.members = stack, members

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.stack(images.expand(self.members, *images.shape))
        return logits.transpose(0, 1)


def accuracy_of(logits: Tensor, labels: Tensor) -> float:
    """Return the fraction of logits (N, classes) whose top class is the label (N,)."""
    return float((logits.argmax(1) == labels).double().mean())
