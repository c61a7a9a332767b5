"""Views: augmentation as data. A view is drawn from (seed, sample index, view number) and nothing else."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

WORDS_PER_COUNTER = 4  # Philox gives four 64-bit words per step of its counter


class Stream(IntEnum):
    """Independent sequences of random numbers under one seed."""

    VIEWS = 0
    TARGETS = 1
    FRESH_VIEWS = 2
    FRESH_TARGETS = 3
    OTHER_VIEWS = 4
    OTHER_IMAGES = 5


class ViewParameters(NamedTuple):
    """What was drawn for each row of a view."""

    crop: NDArray[np.int16]
    """(N, 2): top and left in the padded image, 0 to 2 * padding."""
    flip: NDArray[np.uint8]
    """(N,): 1 where the crop is mirrored left to right."""


def uniforms(seed: int, stream: Stream, view: int, start: int, rows: int, width: int) -> NDArray[np.float64]:
    """Return random numbers in [0, 1) for rows start .. start + rows of a view, `width` of them per row.

    Counter-based (Philox 4x64, Salmon et al., 2011): what a row gets depends on (seed, stream, view, row) alone, not
    on which rows are asked for together.

    Returns:
        (rows, width) float64.
    """
    counters = -(-width // WORDS_PER_COUNTER)
    bits = np.random.Philox(key=np.array([seed, (int(stream) << 32) | view], np.uint64))
    bits.advance(start * counters)
    words = bits.random_raw(rows * counters * WORDS_PER_COUNTER).reshape(rows, counters * WORDS_PER_COUNTER)[:, :width]
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_views(
    seed: int, view: int, start: int, rows: int, padding: int, flip: bool, stream: Stream = Stream.VIEWS
) -> ViewParameters:
    """Draw crop offsets, uniform on 0 .. 2 * padding, and flips, with probability one half if `flip`.

    Example:
        >>> draw_views(seed=0, view=0, start=0, rows=2, padding=1, flip=True).crop.tolist()
        [[0, 0], [1, 0]]
        >>> draw_views(seed=0, view=0, start=1, rows=1, padding=1, flip=True).crop.tolist()  # of row 1, asked for alone
        [[1, 0]]
    """
    numbers = uniforms(seed, stream, view, start, rows, 3)
    crop = np.floor(numbers[:, :2] * (2 * padding + 1)).astype(np.int16)
    return ViewParameters(crop, (flip & (numbers[:, 2] < 0.5)).astype(np.uint8))


def apply_views(images: Tensor, crop: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Cut views out of images padded with black.

    Args:
        images: (N, C, H, W), any dtype.
        crop: (N, 2) integer, as drawn.
        flip: (N,) 0 or 1.
        padding: pixels on each side.

    Returns:
        (N, C, H, W) of the same dtype.

    Example:
        >>> image = torch.tensor([[[[1, 2], [3, 4]]]])
        >>> apply_views(image, crop=torch.tensor([[0, 2]]), flip=torch.tensor([0]), padding=1)
        tensor([[[[0, 0],
                  [2, 0]]]])
    """
    count, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, (padding,) * 4)
    columns = torch.arange(width, device=device).expand(count, width)
    columns = torch.where(flip[:, None].bool(), width - 1 - columns, columns) + crop[:, 1:].long()
    rows = torch.arange(height, device=device) + crop[:, :1].long()
    sample = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
