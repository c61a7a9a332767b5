"""Views: augmentation as data. A view is drawn from (seed, sample index, view number) and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.images.rule import Rule, takes_boxes

WORDS_PER_COUNTER = 4  # Philox gives four 64-bit words per step of its counter
TRIES = 10  # crops that are drawn until one fits into its image
CHANCES = 2 * TRIES + 6  # random numbers of a resized crop: tries, place, mirror, three colours
WHOLE_WEIGHT = 2048  # what the weights of a resized pixel add up to; whole numbers so small are exact in any float
WHOLE_FACTOR = 128  # by which brightness, contrast and saturation are divided
GRAY = (4899, 9617, 1868)  # of red, green and blue in 16,384: ITU-R BT.601
BYTES_AT_ONCE = 1 << 22  # of pixels in float32 while crops are resized


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
    """(N, 2): top and left in the padded image; or (N, 4), also height and width, of crops that are resized."""
    flip: NDArray[np.uint8]
    """(N,): 1 where the crop is mirrored left to right."""
    colour: NDArray[np.int16]
    """(N, 3): factors of brightness, contrast and saturation in 128ths; (N, 0) where colours stay."""

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same as tensors on a device."""
        crop, flip, colour = (on_device(each, device) for each in self)
        return crop, flip, colour


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on a device, without a copy to it of what is empty."""
    tensor = torch.from_numpy(array)
    return tensor.to(device) if array.size else torch.empty_like(tensor, device=device)


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
    seed: int,
    view: int,
    start: int,
    rows: int,
    rule: Rule,
    image: Sequence[int],
    size: Sequence[int],
    stream: Stream = Stream.VIEWS,
) -> ViewParameters:
    """Draw crops, mirror images with probability one half, and colours, by a rule.

    Args:
        seed, view, start, rows, stream: as for `uniforms`.
        rule: of the views.
        image: (height, width) of the images.
        size: (height, width) of the views.

    Example:
        >>> from pipeline.core.parameters import Views
        >>> rule = Views(padding=1, flip=True)
        >>> draw_views(seed=0, view=0, start=0, rows=2, rule=rule, image=(8, 8), size=(8, 8)).crop.tolist()
        [[0, 0], [1, 0]]
        >>> draw_views(seed=0, view=0, start=1, rows=1, rule=rule, image=(8, 8), size=(8, 8)).crop.tolist()  # of row 1
        [[1, 0]]
    """
    boxes = takes_boxes(rule, image, size)
    numbers = uniforms(seed, stream, view, start, rows, CHANCES if boxes else 3)
    place, mirrored, colours = numbers[:, :2], numbers[:, 2], numbers[:, 3:6]
    padded = np.array(image) + 2 * rule.padding
    if rule.scale is not None:
        crop = _boxes(numbers[:, 6:].reshape(rows, TRIES, 2), place, image, rule.scale, rule.ratio)
    else:
        corner = np.floor(place * (padded - size + 1)).astype(np.int16)
        crop = np.concatenate([corner, np.full_like(corner, size)], 1) if boxes else corner
    flip = (rule.flip & (mirrored < 0.5)).astype(np.uint8)
    if not any(rule.jitter):
        return ViewParameters(crop, flip, np.empty((rows, 0), np.int16))
    factors = 1 + np.array(rule.jitter) * (2 * colours - 1)
    return ViewParameters(crop, flip, np.rint(WHOLE_FACTOR * factors).astype(np.int16))


def _boxes(
    tries: NDArray[np.float64],
    place: NDArray[np.float64],
    image: Sequence[int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> NDArray[np.int16]:
    """Draw crops of random area and shape (Szegedy et al., 2015), by the rule of torchvision's RandomResizedCrop.

    The share of the image is uniform on `scale`, the logarithm of width by height on that of `ratio`. The first of ten
    that fits is taken; where none does, the largest crop in the middle whose shape is within `ratio`.

    Args:
        tries: (N, 10, 2) uniform on [0, 1).
        place: (N, 2) uniform on [0, 1), which decides where in the image a crop lies.
        image: (height, width).
        scale: least and largest share of the image.
        ratio: least and largest width by height.

    Returns:
        (N, 4) top, left, height, width.
    """
    height, width = image
    area = height * width * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
    low, high = np.log(ratio)
    shape = np.exp(low + (high - low) * tries[..., 1])
    sides = np.rint(np.sqrt(np.stack([area / shape, area * shape], -1)))  # (N, 10, 2): height, width
    fits = ((sides >= 1) & (sides <= image)).all(-1)
    rows = np.arange(len(tries))
    chosen = sides[rows, fits.argmax(1)]
    corner = np.floor(place * (np.array(image) - chosen + 1))
    within = min(max(width / height, ratio[0]), ratio[1])
    middle = np.array([min(height, round(width / within)), min(width, round(height * within))])
    none = ~fits.any(1)
    chosen[none], corner[none] = middle, (np.array(image) - middle) // 2
    return np.concatenate([corner, chosen], 1).astype(np.int16)


def apply_views(
    images: Tensor, crop: Tensor, flip: Tensor, colour: Tensor, padding: int, size: Sequence[int]
) -> Tensor:
    """Cut views out of images: the crop, then its mirror image, then its colours.

    All arithmetic is exact, so that every device gives the same bits.

    Args:
        images: (N, C, H, W), any dtype; uint8 for resized crops and colours.
        crop: (N, 2) or (N, 4) integer, as drawn: where to cut in the padded images; crops of another size are resized.
        flip: (N,) 0 or 1.
        colour: (N, 3) integer, or (N, 0).
        padding: pixels on each side.
        size: (height, width) of the views.

    Returns:
        (N, C, height, width) of the same dtype.

    Example:
        >>> image, no_colour = torch.tensor([[[[1, 2], [3, 4]]]]), torch.empty(1, 0)
        >>> apply_views(image, torch.tensor([[0, 2]]), torch.tensor([0]), no_colour, padding=1, size=(2, 2))
        tensor([[[[0, 0],
                  [2, 0]]]])
    """
    padded = F.pad(images, (padding,) * 4)
    if crop.shape[-1] == 2:
        return _cut(padded, crop.long(), flip, size)
    at_once = max(1, BYTES_AT_ONCE // (4 * max(1, padded[:1].numel())))
    parts = [slice(start, start + at_once) for start in range(0, len(padded), at_once)]
    resized = [_resized(padded[part], crop[part].long(), flip[part], colour[part], size) for part in parts]
    return torch.cat(resized) if resized else padded.new_empty(0, padded.shape[1], *size)


def _cut(images: Tensor, corner: Tensor, flip: Tensor, size: Sequence[int]) -> Tensor:
    """Return crops of one size; of crops as large as the image, its last rows and columns go on past its end."""
    count, channels, height, width = images.shape
    device = images.device
    columns = torch.arange(size[1], device=device).expand(count, size[1])
    columns = torch.where(flip[:, None].bool(), size[1] - 1 - columns, columns) + corner[:, 1:]
    rows = torch.arange(size[0], device=device) + corner[:, :1]
    if tuple(size) == (height, width):
        rows, columns = rows.clamp(max=height - 1), columns.clamp(max=width - 1)
    sample = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    return images[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _resized(images: Tensor, box: Tensor, flip: Tensor, colour: Tensor, size: Sequence[int]) -> Tensor:
    """Return crops, resized by a triangular filter as wide as a pixel of the view, as Pillow's BILINEAR; (N, C, h, w).

    Rows are resized first, rounded, then columns. Weights and pixels are whole numbers whose products add up to less
    than 2^24, and weights have at most 11 significant bits: float32 is exact in any order, and so is TF32.
    """
    height, width = images.shape[-2:]
    crops = _cut(images, box[:, :2], torch.zeros_like(flip), (height, width)).float()
    down = _weights(height, size[0], images.device)[box[:, 2]].float()
    across = _weights(width, size[1], images.device)[box[:, 3]].float()
    across = torch.where(flip[:, None, None].bool(), across.flip(1), across)
    narrow = _rounded(down[:, None] @ crops, WHOLE_WEIGHT)
    views = _rounded(narrow @ across[:, None].mT, WHOLE_WEIGHT)
    return (_recoloured(views, colour.float()) if colour.shape[1] else views).to(images.dtype)


def _rounded(values: Tensor, divisor: int) -> Tensor:
    """Return whole numbers (float32, changed in place) divided by a power of two, halves up."""
    return values.div_(divisor).add_(0.5).floor_()


@functools.lru_cache(maxsize=8)
def _weights(longest: int, size: int, device: torch.device) -> Tensor:
    """Return by what to multiply the pixels of a crop of each length to have `size` pixels, in 2048ths.

    Returns:
        (longest + 1, size, longest) float16: of crops of 0 to `longest` pixels, with 0 where they end.
    """
    table = np.zeros((longest + 1, size, longest), np.float16)
    for length in range(1, longest + 1):
        step = length / size
        reach = max(step, 1.0)  # of the filter: a pixel of the view, or of the image if that is wider
        centre = (np.arange(size) + 0.5) * step
        distance = np.abs(np.arange(length) + 0.5 - centre[:, None]) / reach
        weights = np.maximum(0, 1 - distance)
        whole = np.rint(WHOLE_WEIGHT * weights / weights.sum(1, keepdims=True))
        whole[np.arange(size), whole.argmax(1)] += WHOLE_WEIGHT - whole.sum(1)
        table[length, :, :length] = whole
    return torch.from_numpy(table).to(device)


def _recoloured(views: Tensor, colour: Tensor) -> Tensor:
    """Return views (N, C, H, W) of other brightness, contrast and saturation, in this order, each rounded.

    Each is a mean, weighted by its factor and what it lacks to 1, of the view and of black, of the view's mean gray,
    and of each pixel's gray, clipped to what a pixel can be, as torchvision's ColorJitter has it. All numbers are
    whole and below 2^24.
    """
    brightness, contrast, saturation = colour[:, :, None, None, None].unbind(1)
    views = _mixed(views, torch.zeros_like(brightness), brightness)
    mean = _gray(views).double().mean((1, 2, 3), keepdim=True).add(0.5).floor().float()
    views = _mixed(views, mean, contrast)
    return _mixed(views, _gray(views), saturation)


def _mixed(values: Tensor, others: Tensor, factor: Tensor) -> Tensor:
    return _rounded(values * factor + others * (WHOLE_FACTOR - factor), WHOLE_FACTOR).clamp_(0, 255)


def _gray(views: Tensor) -> Tensor:
    """Return (N, 1, H, W), whole numbers."""
    if views.shape[1] == 1:
        return views
    red, green, blue = (views[:, channel, None] * weight for channel, weight in enumerate(GRAY))
    return _rounded(red.add_(green).add_(blue), sum(GRAY))
