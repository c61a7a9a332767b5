"""Agreement on planes through images (Somepalli et al., 2022): how alike decision regions are, off the data too."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.images.pixels import pixels
from pipeline.networks.classifier import Classifier
from pipeline.networks.predict import rows_of_a_batch

TRIPLETS = 200  # of images
POINTS, FEWEST_POINTS = 50, 5  # of each plane
LARGE_IMAGE = 3 * 64 * 64  # values; of images of more, planes have fewer points in proportion
MARGIN = 0.1  # beyond the images, as a share of their distance


@torch.no_grad()
def classes_on_planes(model: Classifier, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the class (TRIPLETS * points,) that a frozen model predicts at points of planes through three images each.

    Images and points are drawn at random, the same for every model: x1 + a (x2 - x1) + b (x3 - x1) with a and b
    uniform in [-MARGIN, 1 + MARGIN]. Points outside [0, 1] are not clipped. A plane has `points_of_a_plane` of them.

    Args:
        model: on its device.
        images: (N, C, H, W), at least 3.
    """
    device = model.mean.device
    found = [model(points.to(device)).argmax(1).cpu().numpy() for points in _points(images)]
    return np.concatenate(found).astype(np.int64)


def points_of_a_plane(shape: tuple[int, ...]) -> int:
    """Return how many points of a plane through images (C, H, W) are asked: POINTS, and fewer for large images."""
    return max(FEWEST_POINTS, min(POINTS, POINTS * LARGE_IMAGE // math.prod(shape)))


def _points(images: NDArray[np.uint8]) -> Iterator[Tensor]:
    """Yield batches of points (n, C, H, W) of one plane after the other."""
    generator = np.random.default_rng(0)
    rows, count = rows_of_a_batch(images.shape[1:]), points_of_a_plane(images.shape[1:])
    for _ in range(TRIPLETS):
        first, second, third = pixels(torch.from_numpy(images[generator.choice(len(images), 3, replace=False)]))
        places = generator.uniform(-MARGIN, 1 + MARGIN, (count, 2)).astype(np.float32)
        for some in torch.split(torch.from_numpy(places), rows):
            a, b = some[:, :, None, None, None].unbind(1)
            yield first + a * (second - first) + b * (third - first)
