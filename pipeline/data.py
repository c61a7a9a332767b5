"""Datasets by name, their splits, and the prepared files that every later stage reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.provenance import fingerprint
from pipeline.storage import written_hdf5

SPLITS = ("train", "validation", "test")
CHUNK_BYTES = 1 << 18
FACTS = ("class_names", "mean", "std", "digest")  # attributes of a prepared file


class Images(NamedTuple):
    """Labelled images."""

    images: NDArray[np.uint8]
    """(N, C, H, W)."""
    labels: NDArray[np.int64]
    """(N,), positions in the class names."""


class Prepared(NamedTuple):
    """One split of a prepared dataset, in memory."""

    images: NDArray[np.uint8]
    """(N, C, H, W)."""
    labels: NDArray[np.int64]
    """(N,)."""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel, of the training split, for pixels in [0, 1]."""
    std: tuple[float, ...]
    """Per channel, of the training split, for pixels in [0, 1]; above 0."""
    digest: str
    """sha256 of images, labels and class names."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def thinned(self, count: int) -> Prepared:
        """Every n-th image, so that about `count` are left; the digest stays that of the whole split."""
        step = max(1, len(self.labels) // count)
        return self._replace(images=self.images[::step], labels=self.labels[::step])


def load_digits() -> tuple[Images, tuple[str, ...]]:
    """The 1,797 handwritten digits (8x8, gray) that come with scikit-learn."""
    from sklearn.datasets import load_digits as load  # imported here: slow, and no other dataset needs it

    digits = load()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the originals have 17 levels
    return Images(pixels[:, None], digits.target.astype(np.int64)), tuple(map(str, digits.target_names))


SOURCES: dict[str, Callable[[], tuple[Images, tuple[str, ...]]]] = {"digits": load_digits}


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


def prepare(
    data: Images, class_names: tuple[str, ...], test_fraction: float, validation_fraction: float, seed: int
) -> dict[str, Prepared]:
    """Split a dataset into train, validation and test; the statistics come from train alone.

    Raises:
        DataError: one class only, labels outside the classes, or a split without samples.
    """
    check_labels(data.labels, class_names, "the dataset")
    rest, test = split_by_class(data.labels, test_fraction, seed)
    train, validation = split_by_class(data.labels[rest], validation_fraction, seed + 1)
    rows = {"train": rest[train], "validation": rest[validation], "test": test}
    for name, chosen in rows.items():
        if not len(chosen):
            raise DataError(f"the {name} split is empty: {len(data.labels)} images are too few for these fractions")
    pixels = data.images[rows["train"]].astype(np.float64) / 255
    mean = tuple(map(float, pixels.mean((0, 2, 3))))
    # A constant channel must not divide by zero.
    std = tuple(float(max(value, 1 / 255)) for value in pixels.std((0, 2, 3)))
    return {
        name: _prepared(data.images[chosen], data.labels[chosen], class_names, mean, std)
        for name, chosen in rows.items()
    }


def _prepared(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    class_names: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Prepared:
    return Prepared(images, labels, class_names, mean, std, content_digest(images, labels, class_names))


def content_digest(images: NDArray[np.uint8], labels: NDArray[np.int64], class_names: Sequence[str]) -> str:
    """The sha256 of a split's content, in hexadecimal; independent of the file around it."""
    digest = hashlib.sha256(json.dumps([images.shape, class_names]).encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(np.ascontiguousarray(labels.astype("<i8")).data)
    return digest.hexdigest()


def check_labels(labels: NDArray[np.int64], class_names: tuple[str, ...], source: object) -> None:
    """Refuse fewer than two classes and labels that name none of them."""
    if len(class_names) < 2:
        raise DataError(f"{source}: has {len(class_names)} class, at least 2 are needed for a boundary")
    outside = (labels < 0) | (labels >= len(class_names))
    if outside.any():
        row = int(np.argmax(outside))
        raise DataError(f"{source}: label {labels[row]} of row {row} is outside the {len(class_names)} classes")


def write_prepared(path: Path, split: Prepared) -> None:
    """Write a split to an HDF5 file, atomically: `image`, `label` and attributes."""
    with written_hdf5(path) as file:
        rows = max(1, min(len(split.images), CHUNK_BYTES // split.images[0].nbytes))
        file.create_dataset("image", data=split.images, chunks=(rows, *split.image_shape))
        file.create_dataset("label", data=split.labels)
        facts = {name: getattr(split, name) for name in FACTS}
        for name, value in {**facts, "facts_digest": fingerprint(facts)}.items():
            file.attrs[name] = json.dumps(value)


def read_prepared(path: Path) -> Prepared:
    """Read a split and check its digest.

    Raises:
        DataError: the file is missing, truncated, changed since it was written, or its labels are unusable.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such prepared file; make it with: python -m stages.prepare")
    try:
        with h5py.File(path, "r") as file:
            facts = {name: json.loads(file.attrs[name]) for name in FACTS}
            facts_digest = json.loads(file.attrs["facts_digest"])
            images, labels = file["image"][:], file["label"][:]
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = f"not a whole prepared file ({error})"
        raise DataError(f"{path}: {reason}; make it again: python -m stages.prepare") from None
    if fingerprint(facts) != facts_digest or content_digest(images, labels, facts["class_names"]) != facts["digest"]:
        raise DataError(f"{path}: its content does not match its digest; make it again: python -m stages.prepare")
    names = tuple(facts["class_names"])
    check_labels(labels, names, path)
    return Prepared(images, labels, names, tuple(facts["mean"]), tuple(facts["std"]), facts["digest"])
