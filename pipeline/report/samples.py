"""Samples of a dataset to look at: images, their boundary-supporting samples and perturbations, as pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.core.status import Status
from pipeline.images.pixels import pixels
from pipeline.images.prepared import Prepared
from pipeline.search.boundary import probability_margin
from pipeline.shards.manifest import Manifest
from pipeline.shards.order import shards_by_view
from pipeline.shards.reader import BoundaryShards, samples_of, views_again

SHARDS_SEARCHED = 8  # of the first view, at most: the gallery shows examples, not extremes


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One converged sample and what it started from."""

    image: Tensor
    """(C, H, W) float32 in [0, 1], the base sample."""
    sample: Tensor
    """(C, H, W) float32, on the boundary."""
    base: int
    target: int
    probability_margin: float
    """At the sample."""
    distance: float
    """L2 in pixel space."""
    logits: Tensor
    """(classes,) of the teacher at the image."""


def typical_examples(shards: BoundaryShards, train: Prepared, most: int) -> list[Example]:
    """Return, for each base class, the converged sample of median distance among the first ones of view 0, if any.

    Args:
        shards: the dataset.
        train: the training split that it was made from, for datasets without embedded images.
        most: how many classes.
    """
    if not shards.manifest.targets:
        return []
    columns: dict[str, list[NDArray[np.float64]]] = {"label": [], "status": [], "distance": []}
    for shard in shards_by_view(shards.manifest)[0][:SHARDS_SEARCHED]:
        for name, values in shards.read(shard, columns).items():
            columns[name].append(values if name == "label" else values[:, 0])
    label, status, distance = (np.concatenate(values) for values in columns.values())
    rows = []
    for number in np.unique(label):
        (mine,) = np.nonzero((label == number) & (status == Status.CONVERGED))
        if len(mine):
            rows.append(int(mine[np.argsort(distance[mine], kind="stable")[len(mine) // 2]]))
    return [_example(shards, train, row) for row in rows[:most]]


def _example(shards: BoundaryShards, train: Prepared, number: int) -> Example:
    row = shards[number]
    image = image_of(row, train, shards.manifest)
    return Example(
        image=pixels(image),
        sample=samples_of(image, row["delta"][0], row["delta_scale"][0]),
        base=int(row["label"]),
        target=int(row["target"][0]),
        probability_margin=float(probability_margin(row["margin"][0])),
        distance=float(row["distance"][0]),
        logits=row["teacher_logits"],
    )


def image_of(row: dict[str, Tensor], train: Prepared, manifest: Manifest) -> Tensor:
    """Return (C, H, W) uint8: the view of a row, made again from the training split where it is not embedded."""
    if "image" in row:
        return row["image"]
    image = torch.from_numpy(train.images[[int(row["index"])]])
    return views_again(image, {name: value[None] for name, value in row.items()}, manifest)[0]


def amplification(example: Example) -> float:
    """Return by what to multiply a perturbation so that its largest pixel is black or white around grey."""
    largest = float((example.sample - example.image).abs().max())
    return 0.5 / largest if largest > 0 else 1.0


def pictures(example: Example) -> Iterator[bytes]:
    """Yield PNG files of the image, its sample (clipped to [0, 1]) and the amplified perturbation, one pixel each."""
    yield png(example.image)
    yield png(example.sample)
    yield png(0.5 + amplification(example) * (example.sample - example.image))


def png(image: Tensor) -> bytes:
    """Return an image (C, H, W), 1 or 3 channels, clipped to [0, 1], as PNG."""
    values = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return png_of_picture(Image.fromarray(values[..., 0] if values.shape[2] == 1 else values))


def png_of_picture(picture: Image.Image) -> bytes:
    """Return a picture of Pillow as PNG."""
    content = BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()
