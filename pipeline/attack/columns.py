"""From a teacher's search and a block of images to the columns of a shard."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.parameters import Attack, Views
from pipeline.core.status import Status
from pipeline.images.pixels import pixels
from pipeline.images.prepared import Prepared
from pipeline.images.views import Stream, ViewParameters, apply_views, draw_views, uniforms
from pipeline.machine.device import one_cpu_thread
from pipeline.search.targets import draw_targets
from pipeline.search.teacher_search import TeacherSearch

# Columns that a search fills in: fields of its result.
SEARCHED = ("target", "delta", "delta_scale", "boundary_logits", "margin", "distance", "status", "evaluations")


class Block(NamedTuple):
    """A contiguous block of the training split under one view: the content of one shard."""

    view: int
    number: int
    start: int
    rows: int


@one_cpu_thread()
@torch.no_grad()
def shard_values(
    search: TeacherSearch, train: Prepared, block: Block, views: Views, attack: Attack
) -> dict[str, NDArray[Any]]:
    """Return all columns of one shard, whose bytes do not depend on the number of CPU threads."""
    rows = slice(block.start, block.start + block.rows)
    drawn = draw_views(attack.seed, block.view, block.start, block.rows, views.padding, views.flip)
    seen = _cut(train.images[rows], drawn, views.padding, search.device)
    images = pixels(seen)
    logits = search.logits(images).cpu().numpy()
    labels = train.labels[rows]
    correct = logits.argmax(1) == labels
    noise = uniforms(attack.seed, Stream.TARGETS, block.view, block.start, block.rows, logits.shape[1])
    target = draw_targets(logits, labels, noise, attack.targets)

    samples = (block.rows, attack.targets)
    values: dict[str, NDArray[Any]] = {
        "index": np.arange(rows.start, rows.stop, dtype=np.uint32),
        "label": labels,
        "image": seen.cpu().numpy(),
        "crop": drawn.crop,
        "flip": drawn.flip,
        "teacher_logits": logits,
        "target": np.where(correct[:, None], target, -1).astype(np.int16),
        "delta": np.zeros((*samples, *train.image_shape), np.int8),
        "delta_scale": np.zeros(samples, np.float32),
        "boundary_logits": np.repeat(logits[:, None], attack.targets, 1),
        "margin": np.zeros(samples, np.float32),
        "distance": np.zeros(samples, np.float32),
        "status": np.full(samples, Status.BASE_MISCLASSIFIED, np.uint8),
        "evaluations": np.zeros(samples, np.uint16),
    }
    if correct.any():
        drawn_by = (attack.seed, block.view, block.start)
        other_views = partial(_other_views, train, block, views, attack, search.device)
        _search_into(values, search, images, correct, drawn_by, other_views)
    if not attack.embed_images:
        del values["image"]
    return values


def _search_into(
    values: dict[str, NDArray[Any]],
    search: TeacherSearch,
    images: Tensor,
    correct: NDArray[np.bool_],
    draw: tuple[int, ...],
    other_views: Callable[[Literal["same", "any"]], Tensor],
) -> None:
    """Fill in what a search finds for the rows that the teacher classifies correctly, all targets at once."""

    def on_device(column: str) -> Tensor:
        return torch.from_numpy(values[column][correct]).to(search.device)

    target = on_device("target").long()
    count = target.shape[1]
    rows = torch.from_numpy(correct).to(search.device)

    def of_correct_rows(image: Literal["same", "any"]) -> Tensor:
        return pixels(other_views(image)[rows]).flatten(0, 1)

    result = search.find(
        images[rows].repeat_interleave(count, 0),
        on_device("label").repeat_interleave(count),
        target.flatten(),
        on_device("teacher_logits").repeat_interleave(count, 0),
        draw,
        of_correct_rows,
    )
    for name in SEARCHED:
        found = getattr(result, name)
        if name == "delta":  # whole numbers: a quarter of the bytes to bring from a device
            found = found.to(torch.int8)
        array = found.cpu().numpy()
        values[name][correct] = array.reshape(-1, count, *array.shape[1:])
    # The search's network may see a tie where the reference sees a correct base: by rounding, very rarely.
    lost = values["status"] == Status.BASE_MISCLASSIFIED
    values["target"][lost] = -1
    values["margin"][lost] = 0
    image_logits = np.broadcast_to(values["teacher_logits"][:, None], values["boundary_logits"].shape)
    values["boundary_logits"][lost] = image_logits[lost]


def _cut(images: NDArray[np.uint8], drawn: ViewParameters, padding: int, device: torch.device) -> Tensor:
    """Return views (N, C, H, W) uint8 of images as they were drawn, cut on the device."""
    on_device, crop, flip = (torch.from_numpy(each).to(device) for each in (images, drawn.crop, drawn.flip))
    return apply_views(on_device, crop, flip, padding)


def _other_views(
    train: Prepared, block: Block, views: Views, attack: Attack, device: torch.device, image: Literal["same", "any"]
) -> Tensor:
    """Return another view (rows, targets, C, H, W) uint8 for each sample of a block: of its image, or of any one."""
    count, images = attack.targets, len(train.labels)
    start, rows = block.start * count, block.rows * count
    drawn = draw_views(attack.seed, block.view, start, rows, views.padding, views.flip, Stream.OTHER_VIEWS)
    index = np.arange(start, start + rows) // count
    if image == "any":
        numbers = uniforms(attack.seed, Stream.OTHER_IMAGES, block.view, start, rows, 1)
        index = (numbers[:, 0] * images).astype(np.int64)
    seen = _cut(train.images[index], drawn, views.padding, device)
    return seen.reshape(block.rows, count, *train.image_shape)
