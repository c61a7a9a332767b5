"""Datasets by name: labelled images, each opened when it is needed."""

from __future__ import annotations

import contextlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.errors import DataError, shown
from pipeline.core.parameters import Dataset
from pipeline.core.text import one_line
from pipeline.prepare.image_files import ImageFiles, image_files, listed, open_image

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}
LAYOUT = "expected class folders of images, CLASS/IMAGE, or train/CLASS/IMAGE and test/CLASS/IMAGE"

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
            yield _image_folder(path, files)
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


def _image_folder(path: Path, files: ImageFiles) -> RawDataset:
    """Return images in class folders, below `train`, `test` and `validation` (or `val`) where there are such."""
    place = _place_of_classes(files.names)
    inside = {name: tuple(name[len(place) :].split("/")) for name in files.names if name.startswith(place)}
    has_parts = any(_split_of(parts[0]) and len(parts) > 2 for parts in inside.values())
    by_part: dict[str, list[tuple[str, str]]] = {}
    left_out: Counter[str] = Counter()
    deep: set[str] = set()
    for name in files.names:
        parts = inside.get(name, ())
        part, rest = (_split_of(parts[0]), parts[1:]) if has_parts and parts else ("train", parts)
        if part and len(rest) > 1:
            by_part.setdefault(part, []).append((rest[0], name))
            if len(rest) > 2:
                deep.add(rest[0])
        else:
            left_out[name.rpartition("/")[0] or "the top folder"] += 1
    if "train" not in by_part:
        raise DataError(f"{path}: no images found in class folders of a training part; {LAYOUT}")
    if has_parts:
        _check_parts(path, inside.values(), by_part)
    else:
        _check_class_folders(path, inside.values())
    class_names = tuple(sorted({label for label, _ in by_part["train"]}))
    _check_class_names(path, class_names, by_part)
    number = {label: position for position, label in enumerate(class_names)}

    def part_of(entries: list[tuple[str, str]]) -> Part:
        labels = np.array([number[label] for label, _ in entries], np.int64)
        return Part(
            labels,
            lambda row: open_image(files.open(entries[row][1])),
            lambda row: f"{path}: {shown(entries[row][1], longest=1000)}",
        )

    notes = [*_left_out(left_out), *_without_images(files, place, has_parts), *_doubtful_classes(class_names, deep)]
    notes += files.notes
    return RawDataset(class_names, {part: part_of(entries) for part, entries in by_part.items()}, notes)


def _split_of(folder: str) -> str | None:
    """Return the split that a folder is taken for by its name."""
    return SPLIT_FOLDERS.get(folder.lower())


def _place_of_classes(names: Sequence[str]) -> str:
    """Return what the names of all images begin with before their classes or parts, the last slash included.

    It is the way through folders that hold the one folder in which there are images; images beside it do not count.
    """
    place = ""
    while True:
        below = [name[len(place) :].split("/") for name in names if name.startswith(place)]
        tops = {parts[0] for parts in below if len(parts) > 1}
        if len(tops) != 1 or _split_of(*tops) or all(len(parts) <= 2 for parts in below):
            return place
        place += f"{tops.pop()}/"


def _check_parts(path: Path, inside: Iterable[tuple[str, ...]], by_part: dict[str, Any]) -> None:
    """Refuse a part whose images lie in no class folders."""
    for parts in inside:
        part = _split_of(parts[0])
        if part and len(parts) == 2 and part not in by_part:
            raise DataError(f"{path}: the images of '{shown(parts[0])}' are in no class folders; {LAYOUT}")


def _check_class_folders(path: Path, inside: Iterable[tuple[str, ...]]) -> None:
    """Refuse folders side by side of which some hold images, others folders of images: which ones are the classes?"""
    flat, deep = set(), set()
    for parts in inside:
        if len(parts) == 2:
            flat.add(parts[0])
        elif len(parts) > 2:
            deep.add(parts[0])
            if len(parts) > 3 and _split_of(parts[1]):
                raise DataError(
                    f"{path}: '{shown(parts[1])}' is in '{shown(parts[0])}', beside which there are other folders of "
                    f"images: take them away; {LAYOUT}"
                )
    if flat and deep - flat:
        raise DataError(
            f"{path}: there are images in {listed(sorted(flat))}, but folders of images in "
            f"{listed(sorted(deep - flat))}: take away what is no class, or put its images right into it; {LAYOUT}"
        )


def _check_class_names(path: Path, class_names: tuple[str, ...], by_part: dict[str, list[tuple[str, str]]]) -> None:
    """Refuse classes that are none, and names that are not the same in all parts."""
    splits = [_split_of(name) for name in class_names]
    if all(splits) or len({*splits} - {None}) > 1:
        taken = listed([name for name, split in zip(class_names, splits, strict=True) if split])
        raise DataError(f"{path}: {taken} would be classes by where they are, but are names of parts; {LAYOUT}")
    if len(class_names) == 1:
        raise DataError(f"{path}: all images are of one class, '{shown(class_names[0])}'; {LAYOUT}")
    forms: dict[str, str] = {}
    for part in ("train", *by_part):
        for name in sorted({label for label, _ in by_part[part]}):
            other = forms.setdefault(unicodedata.normalize("NFC", name), name)
            if other != name:
                raise DataError(
                    f"{path}: the classes {other!a} and {name!a} are one text in two Unicode forms: rename one of them"
                )
            if name not in class_names:
                raise DataError(f"{path}: {part} has class '{shown(name)}', which train does not have")


def _left_out(count_in: Counter[str]) -> Iterator[str]:
    """Say which images are in no class folder."""
    if count_in:
        folders = [f"{shown(folder)} ({count:,})" for folder, count in sorted(count_in.items())]
        yield f"left out: images in no class folder: {listed(folders)}"


def _without_images(files: ImageFiles, place: str, has_parts: bool) -> Iterator[str]:
    """Say which folders have no images, where classes or parts are expected and beside them."""
    holding = {name[:at] for name in files.names for at, letter in enumerate(name) if letter == "/"}
    empty = []
    for folder in files.folders:
        above, _, _ = folder.rpartition("/")
        part = above[len(place) :] if above.startswith(place) else ""
        is_expected = place.startswith(f"{above}/" if above else "") or (has_parts and _split_of(part))
        if is_expected and folder not in holding:
            empty.append(folder)
    if empty:
        yield f"left out: folders without images: {listed(empty)}"


def _doubtful_classes(class_names: tuple[str, ...], deep: set[str]) -> Iterator[str]:
    """Say which classes there are that a user may not have meant."""
    if deep:
        yield f"classes that take the images of all folders below theirs: {listed(sorted(deep))}"
    alike: dict[str, list[str]] = {}
    for label in class_names:
        alike.setdefault(unicodedata.normalize("NFKC", label).casefold().strip(), []).append(label)
    twins = [" and ".join(map(ascii, names)) for names in alike.values() if len(names) > 1]
    if twins:
        yield f"classes of their own, though their names are alike: {listed(twins)}"


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
