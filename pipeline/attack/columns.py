"""From a teacher's search and a block of images to the columns of a shard."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.errors import ParameterError
from pipeline.core.parameters import Attack, Views
from pipeline.core.status import Status
from pipeline.images.pixels import pixels
from pipeline.images.prepared import Prepared
from pipeline.images.views import Stream, ViewParameters, apply_views, draw_views, uniforms
from pipeline.machine.device import one_cpu_thread
from pipeline.networks.penultimate import penultimate_features
from pipeline.search.boundary import OtherViews
from pipeline.search.targets import draw_targets
from pipeline.search.teacher_search import TeacherSearch
from pipeline.shards.format import SEARCHED


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
    """Return all columns of one shard, whose bytes do not depend on the number of CPU threads.

    Raises:
        ParameterError: float16 cannot hold the teacher's logits or features, or it has no penultimate features.
    """
    part = _Part.of(search, train, block, views, attack)
    drawn_by = (attack.seed, block.view, block.start)
    other_views = partial(_other_views, train, block, views, attack, search.device)

    def of_searched_rows(image: Literal["same", "any"]) -> Tensor:
        return pixels(other_views(image)[part.searched]).flatten(0, 1)

    if attack.targets:
        _search_into([part], search, drawn_by, of_searched_rows)
    return _as_stored(part, attack)


@one_cpu_thread()
@torch.no_grad()
def joint_values(
    search: TeacherSearch, train: Prepared, blocks: Sequence[Block], views: Views, attack: Attack
) -> list[dict[str, NDArray[Any]]]:
    """Return all columns of some shards that are searched together, by a search that draws nothing.

    The few rows that search longest are then few for all of them. Batches are others than those of one shard alone, so
    values may differ from these by rounding.
    """
    parts = [_Part.of(search, train, block, views, attack) for block in blocks]
    _search_into(parts, search)
    return [_as_stored(part, attack) for part in parts]


class _Part(NamedTuple):
    """A shard before its search, or with what was found."""

    values: dict[str, NDArray[Any]]
    """By column."""
    images: Tensor
    """(rows, C, H, W) float32 in [0, 1], on the device."""
    correct: NDArray[np.bool_]
    """(rows,) those that the teacher classifies correctly, which are searched."""
    searched: Tensor
    """The same, on the device."""

    @classmethod
    def of(cls, search: TeacherSearch, train: Prepared, block: Block, views: Views, attack: Attack) -> _Part:
        rows = slice(block.start, block.start + block.rows)
        drawn_by = (attack.seed, block.view, block.start, block.rows)
        drawn, seen = _views_of(train, train.images[rows], views, drawn_by, Stream.VIEWS, search.device)
        images = pixels(seen)
        with ExitStack() as stack:
            features = stack.enter_context(penultimate_features(search.teacher)) if attack.features else []
            logits = search.logits(images).cpu().numpy()
        labels = train.labels[rows]
        correct = logits.argmax(1) == labels
        values: dict[str, NDArray[Any]] = {
            "index": np.arange(rows.start, rows.stop, dtype=np.uint32),
            "label": labels,
            "crop": drawn.crop,
            "flip": drawn.flip,
            "teacher_logits": logits,
        }
        if drawn.colour.shape[1]:
            values["colour"] = drawn.colour
        if attack.features:
            values["teacher_features"] = torch.cat(features).cpu().numpy()
        if attack.embed_images:
            values["image"] = seen.cpu().numpy()
        if attack.targets:
            noise = uniforms(attack.seed, Stream.TARGETS, block.view, block.start, block.rows, logits.shape[1])
            target = draw_targets(logits, labels, noise, attack.targets)
            values |= _unsearched(logits, np.where(correct[:, None], target, -1), train.view_shape)
        return cls(values, images, correct, torch.from_numpy(correct).to(search.device))


def _unsearched(
    logits: NDArray[np.float32], target: NDArray[np.int64], shape: tuple[int, ...]
) -> dict[str, NDArray[Any]]:
    """Return the columns of samples (rows, targets) as they are without a search."""
    samples = target.shape
    return {
        "target": target.astype(np.int16),
        "delta": np.zeros((*samples, *shape), np.int8),
        "delta_scale": np.zeros(samples, np.float32),
        "boundary_logits": np.repeat(logits[:, None], samples[1], 1),
        "margin": np.zeros(samples, np.float32),
        "distance": np.zeros(samples, np.float32),
        "status": np.full(samples, Status.BASE_MISCLASSIFIED, np.uint8),
        "evaluations": np.zeros(samples, np.uint16),
    }


def _as_stored(part: _Part, attack: Attack) -> dict[str, NDArray[Any]]:
    """Return the columns of a shard in the dtypes that are stored."""
    values = dict(part.values)
    if attack.logits == "float16":
        values["teacher_logits"] = _halved(values["teacher_logits"], "logits", "float32")
    if attack.features:
        values["teacher_features"] = _halved(values["teacher_features"], "features", "false")
    return values


def _halved(values: NDArray[np.float32], name: str, otherwise: str) -> NDArray[np.float16]:
    """Return numbers of the teacher in float16; `otherwise` is what to set `attack.<name>` to where it cannot."""
    largest, limit = float(np.abs(values).max()), float(np.finfo(np.float16).max)
    if not largest <= limit:
        raise ParameterError(
            f"attack.{name}: float16 holds up to {limit:.0f}, but the teacher's {name} reach {largest:.6g}: set it to "
            f"{otherwise}"
        )
    return values.astype(np.float16)


def _search_into(
    parts: Sequence[_Part], search: TeacherSearch, draw: tuple[int, ...] = (), other_views: OtherViews | None = None
) -> None:
    """Fill in what a search finds for the rows that the teacher classifies correctly, all targets at once."""
    rows = [int(part.correct.sum()) for part in parts]
    if not any(rows):
        return
    count = parts[0].values["target"].shape[1]

    def on_device(column: str) -> Tensor:
        return torch.from_numpy(np.concatenate([part.values[column][part.correct] for part in parts])).to(search.device)

    result = search.find(
        torch.cat([part.images[part.searched] for part in parts]).repeat_interleave(count, 0),
        on_device("label").repeat_interleave(count),
        on_device("target").long().flatten(),
        on_device("teacher_logits").repeat_interleave(count, 0),
        draw,
        other_views,
    )
    ends = np.cumsum(rows)[:-1]
    for name in SEARCHED:
        found = getattr(result, name)
        if name == "delta":  # whole numbers: a quarter of the bytes to bring from a device
            found = found.to(torch.int8)
        array = found.cpu().numpy()
        of_parts = np.split(array.reshape(-1, count, *array.shape[1:]), ends)
        for part, of_part in zip(parts, of_parts, strict=True):
            part.values[name][part.correct] = of_part
    for part in parts:
        # The search's network may see a tie where the reference sees a correct base: by rounding, very rarely.
        values = part.values
        lost = values["status"] == Status.BASE_MISCLASSIFIED
        values["target"][lost] = -1
        values["margin"][lost] = 0
        image_logits = np.broadcast_to(values["teacher_logits"][:, None], values["boundary_logits"].shape)
        values["boundary_logits"][lost] = image_logits[lost]


def _views_of(
    train: Prepared,
    images: NDArray[np.uint8],
    views: Views,
    drawn_by: tuple[int, int, int, int],
    stream: Stream,
    device: torch.device,
) -> tuple[ViewParameters, Tensor]:
    """Draw a view of each of some training images, by (seed, view, start, rows), and cut it, uint8, on a device."""
    size = train.view_shape[1:]
    drawn = draw_views(*drawn_by, views, train.images.shape[2:], size, stream)
    return drawn, apply_views(torch.from_numpy(images).to(device), *drawn.on(device), views.padding, size)


def _other_views(
    train: Prepared, block: Block, views: Views, attack: Attack, device: torch.device, image: Literal["same", "any"]
) -> Tensor:
    """Return another view (rows, targets, C, H, W) uint8 for each sample of a block: of its image, or of any one."""
    count, images = attack.targets, len(train.labels)
    start, rows = block.start * count, block.rows * count
    index = np.arange(start, start + rows) // count
    if image == "any":
        numbers = uniforms(attack.seed, Stream.OTHER_IMAGES, block.view, start, rows, 1)
        index = (numbers[:, 0] * images).astype(np.int64)
    drawn_by = (attack.seed, block.view, start, rows)
    _, seen = _views_of(train, train.images[index], views, drawn_by, Stream.OTHER_VIEWS, device)
    return seen.reshape(block.rows, count, *train.view_shape)
