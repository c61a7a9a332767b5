"""Which images go into which split, and the statistics of a split."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import DataError
from pipeline.core.parameters import Dataset
from pipeline.images.prepared import (
    Images,
    Prepared,
    check_labels,
    content_digest,
)
from pipeline.prepare.datasets import Part, RawDataset


def split_by_class(labels: NDArray[np.int64], fraction: float, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Split rows into two parts so that each class contributes the same fraction to the second part.

    Returns:
        Sorted row numbers of the two parts.
    """
    generator = np.random.default_rng(seed)
    taken = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        taken[generator.permutation(rows)[: round(fraction * len(rows))]] = True
    return np.flatnonzero(~taken), np.flatnonzero(taken)


def choose_by_class(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.intp]:
    """Choose so many rows so that the classes keep their proportions, as nearly as whole numbers can.

    Returns:
        Sorted row numbers.
    """
    generator = np.random.default_rng(seed)
    rows = [generator.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    shares = np.array([len(each) * count / len(labels) for each in rows])
    taken = np.floor(shares).astype(int)
    taken[np.argsort(taken - shares, kind="stable")[: count - taken.sum()]] += 1  # the largest remainders
    return np.sort(np.concatenate([each[:number] for each, number in zip(rows, taken, strict=True)]))


def part_by_class(train: Prepared, fraction: float, seed: int) -> Prepared:
    """Return a training split of a fraction of the images, with the classes in proportion, and its own statistics."""
    if fraction == 1:
        return train
    rows = choose_by_class(train.labels, max(1, round(fraction * len(train.labels))), seed)
    images, labels = np.ascontiguousarray(train.images[rows]), train.labels[rows]
    _check_all_classes(labels, train.class_names)
    mean, std = channel_statistics([images])
    digest = content_digest([images], images.shape[1:], labels, train.class_names)
    return train._replace(images=images, labels=labels, mean=mean, std=std, digest=digest)


def split(source: RawDataset, dataset: Dataset) -> dict[str, Part]:
    """Return the train, validation and test parts, split off the training part where the dataset has none.

    Raises:
        DataError: one class only, labels outside the classes, or a part or class without images.
    """
    parts = dict(source.parts)
    for name, part in parts.items():
        check_labels(part.labels, source.class_names, f"the {name} part")
    if "test" not in parts:
        rest, test = split_by_class(parts["train"].labels, dataset.test_fraction, dataset.seed)
        parts["train"], parts["test"] = parts["train"].take(rest), parts["train"].take(test)
    available = len(parts["train"].labels)
    if dataset.train_images is not None and dataset.train_images < available:
        parts["train"] = parts["train"].take(
            choose_by_class(parts["train"].labels, dataset.train_images, dataset.seed + 2)
        )
    if "validation" not in parts:
        train, validation = split_by_class(parts["train"].labels, dataset.validation_fraction, dataset.seed + 1)
        parts["train"], parts["validation"] = parts["train"].take(train), parts["train"].take(validation)
    for name, part in parts.items():
        if not len(part.labels) and (name != "validation" or dataset.validation_fraction):
            raise DataError(f"the {name} split is empty: {available} images are too few for these fractions")
    _check_all_classes(parts["train"].labels, source.class_names)
    return parts


def _check_all_classes(labels: NDArray[np.int64], class_names: tuple[str, ...]) -> None:
    missing = np.flatnonzero(np.bincount(labels, minlength=len(class_names)) == 0)
    if len(missing):
        raise DataError(f"no image of class '{class_names[missing[0]]}' is left in the train split")


def channel_statistics(blocks: Iterable[Images]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of each channel, for pixels in [0, 1]; sums are exact, so the blocks do not matter."""
    count, sums, squares = 0, np.zeros(1, np.int64), np.zeros(1, np.int64)
    for block in blocks:
        pixels = block.astype(np.int64)
        count += block[:, 0].size
        sums, squares = sums + pixels.sum((0, 2, 3)), squares + (pixels**2).sum((0, 2, 3))
    means = tuple(int(total) / (255 * count) for total in sums)
    # Python's integers do not overflow: the variance is exact up to the division.
    variances = [(count * int(s2) - int(s1) ** 2) / (255 * count) ** 2 for s1, s2 in zip(sums, squares, strict=True)]
    # A constant channel must not divide by zero.
    return means, tuple(max(variance**0.5, 1 / 255) for variance in variances)
