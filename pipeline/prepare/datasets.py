"""Datasets by name: labelled images, each opened when it is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.core.parameters import Dataset
from pipeline.core.text import one_line
from pipeline.prepare.image_files import image_files

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}

SPIRALS_NOISE = 0.06  # standard deviation of each coordinate, for a radius of 1


class Part(NamedTuple):
    """Labelled images."""

    labels: NDArray[np.int64]
    """(N,), positions in the class names."""
    image: Callable[[int], Image.Image]
    """Opens the image of a row, from any thread; raises what PIL raises when it is damaged."""
    name: Callable[[int], str]
    """What a row is called in messages."""

    def take(self, rows: NDArray[np.intp]) -> Part:
        """Return some of the rows."""
        return Part(self.labels[rows], lambda row: self.image(int(rows[row])), lambda row: self.name(int(rows[row])))


class RawDataset(NamedTuple):
    """A dataset as it comes: `train`, and `validation` and `test` where it has parts of that name."""

    class_names: tuple[str, ...]
    parts: dict[str, Part]
    notes: Sequence[str] = ()
    """What was left out, in words."""


@contextlib.contextmanager
def open_dataset(dataset: Dataset, scratch: Path) -> Iterator[RawDataset]:
    """Open a dataset by name; torchvision's are downloaded to `dataset.path` when they are not there.

    Args:
        dataset: its name and path.
        scratch: folder for temporary files, of the size of the images.

    Raises:
        DataError: it is not there and cannot be downloaded, or it is not in the expected form.
    """
    path = Path(dataset.path)
    if dataset.name == "imagefolder":
        with image_files(path, scratch) as files:
            source = _image_folder(path, files.names, lambda name: Image.open(files.open(name)))
            yield source._replace(notes=[*source.notes, *files.notes])
    elif dataset.name == "digits":
        yield _digits()
    elif dataset.name == "spirals":
        yield _spirals(dataset.seed)
    else:
        yield _from_torchvision(dataset.name, path)


def _digits() -> RawDataset:
    """Return the 1,797 handwritten digits (8x8, gray) that come with scikit-learn."""
    from sklearn.datasets import load_digits  # imported here: slow, and no other dataset needs it

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the originals have 17 levels
    part = Part(digits.target.astype(np.int64), lambda row: Image.fromarray(pixels[row]), "image {}".format)
    return RawDataset(tuple(map(str, digits.target_names)), {"train": part})


def _spirals(seed: int) -> RawDataset:
    """Return 3,000 points of three spiral arms, as gray images of two pixels: across and up, the middle at mid-grey."""
    generator = np.random.default_rng(seed)
    label = np.arange(3000) % 3
    radius = np.sqrt(generator.uniform(0.02, 1, len(label)))
    angle = 2 * np.pi * (0.75 * radius + label / 3)
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    points += generator.normal(0, SPIRALS_NOISE, points.shape)
    pixels = np.rint(255 * (0.5 + 0.4 * points.clip(-1.25, 1.25))).astype(np.uint8)[:, None]
    part = Part(label.astype(np.int64), lambda row: Image.fromarray(pixels[row]), "point {}".format)
    return RawDataset(("0", "1", "2"), {"train": part})


def _image_folder(path: Path, names: list[str], image: Callable[[str], Image.Image]) -> RawDataset:
    """Return images in class folders, below `train`, `test` and `validation` (or `val`) where there are such."""
    split_names = [tuple(name.split("/")) for name in names]
    while split_names and len({parts[0] for parts in split_names}) == 1 and _is_wrapper(split_names):
        split_names = [parts[1:] for parts in split_names]
    by_part: dict[str, list[tuple[str, str]]] = {}
    has_parts = any(parts[0].lower() in SPLIT_FOLDERS and len(parts) > 2 for parts in split_names)
    left_out: dict[str, int] = {}
    for name, parts in zip(names, split_names, strict=True):
        part, rest = (SPLIT_FOLDERS.get(parts[0].lower()), parts[1:]) if has_parts else ("train", parts)
        if part and len(rest) > 1:
            by_part.setdefault(part, []).append((rest[0], name))
        else:
            folder = name.rpartition("/")[0] or "the top folder"
            left_out[folder] = left_out.get(folder, 0) + 1
    if "train" not in by_part:
        raise DataError(
            f"{path}: no images found; expected class folders of images, CLASS/IMAGE, or train/CLASS/IMAGE and "
            "test/CLASS/IMAGE"
        )
    class_names = tuple(sorted({label for label, _ in by_part["train"]}))
    number = {label: position for position, label in enumerate(class_names)}
    for part, entries in by_part.items():
        unknown = sorted({label for label, _ in entries} - number.keys())
        if unknown:
            raise DataError(f"{path}: {part} has class '{unknown[0]}', which train does not have")

    def part_of(entries: list[tuple[str, str]]) -> Part:
        labels = np.array([number[label] for label, _ in entries], np.int64)
        return Part(labels, lambda row: image(entries[row][1]), lambda row: f"{path}: {entries[row][1]}")

    notes = [f"left out: {count} images in {folder}, which is no class folder" for folder, count in left_out.items()]
    return RawDataset(class_names, {part: part_of(entries) for part, entries in by_part.items()}, notes)


def _is_wrapper(split_names: Sequence[tuple[str, ...]]) -> bool:
    """Return whether the one top folder holds folders of folders, or folders of images, rather than images."""
    return split_names[0][0].lower() not in SPLIT_FOLDERS and all(len(parts) > 2 for parts in split_names)


TORCHVISION = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}


def _from_torchvision(name: str, root: Path) -> RawDataset:
    from torchvision import datasets  # imported here: slow, and only these datasets need it

    loader = getattr(datasets, TORCHVISION[name])
    loaded = {part: _loaded(loader, root, part) for part in ("train", "test")}
    class_names = getattr(loaded["train"], "classes", map(str, range(10)))
    return RawDataset(tuple(class_names), {part: _torchvision_part(part, dataset) for part, dataset in loaded.items()})


def _loaded(loader: Any, root: Path, part: str) -> Any:
    """Return a part of a torchvision dataset, downloaded when it is not there."""
    chosen = {"split": part} if hasattr(loader, "split_list") else {"train": part == "train"}
    try:
        return loader(root, **chosen, download=True)
    except (OSError, RuntimeError, ValueError, EOFError, HTTPException) as error:
        reason = one_line(error)
        raise DataError(
            f"{loader.__name__} cannot be loaded from {root}, nor downloaded to it ({reason}); remove what is damaged "
            f"there, or put there by hand: {', '.join(_files_of(loader, root))}"
        ) from None


def _torchvision_part(part: str, dataset: Any) -> Part:
    labels = np.asarray(dataset.labels if hasattr(dataset, "labels") else dataset.targets, np.int64)
    return Part(labels, lambda row: dataset[row][0], f"{type(dataset).__name__} {part} image {{}}".format)


def _files_of(loader: Any, root: Path) -> list[str]:
    """Return where the files of a torchvision dataset come from, and where they belong."""
    if hasattr(loader, "resources"):  # MNIST and those like it
        folder = root / loader.__name__ / "raw"
        return [f"{loader.mirrors[0]}{name} as {folder / name}" for name, _ in loader.resources]
    if hasattr(loader, "split_list"):  # SVHN
        return [f"{url} as {root / name}" for url, name, _ in map(loader.split_list.get, ("train", "test"))]
    return [f"{loader.url} as {root / loader.filename}"]
