"""Prepared files: one HDF5 file for each split, which every later stage reads."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import DataError
from pipeline.core.files import atomic_path, read_hdf5, reserve
from pipeline.core.provenance import fingerprint

SPLITS = ("train", "validation", "test")
BLOCK_BYTES = 1 << 22  # of images in memory at a time while files are written
HEADER_BYTES = 1 << 16  # more than HDF5 needs around images and labels
ATTRIBUTES = ("class_names", "mean", "std", "digest")  # attributes of a prepared file

Images = NDArray[np.uint8]
"""(N, C, H, W)."""


class Prepared(NamedTuple):
    """One split of a prepared dataset. Images that were read from a file stay there until they are looked at."""

    images: Images
    labels: NDArray[np.int64]
    """(N,)."""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel, of the training split, for pixels in [0, 1]."""
    std: tuple[float, ...]
    """Per channel, of the training split, for pixels in [0, 1]; above 0."""
    digest: str
    """sha256 of images, labels and class names."""
    view_size: tuple[int, int] | None = None
    """(height, width) of the views of images that are kept larger; None: views are as large as images."""

    @property
    def view_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a view: of what networks are for."""
        channels, height, width = self.images.shape[1:]
        return channels, *(self.view_size or (height, width))

    def centred(self) -> Images:
        """Return the middle of each image, as large as a view."""
        _, height, width = self.view_shape
        top, left = (self.images.shape[2] - height) // 2, (self.images.shape[3] - width) // 2
        return self.images[:, :, top : top + height, left : left + width]

    def thinned(self, count: int) -> Prepared:
        """Return every n-th image, so that about `count` are left; the digest stays that of the whole split."""
        step = max(1, len(self.labels) // count)
        return self._replace(images=self.images[::step], labels=self.labels[::step])


def rows_at_a_time(image_shape: Sequence[int]) -> int:
    """Return images of a block while files are written or checked."""
    return max(1, BLOCK_BYTES // max(1, int(np.prod(image_shape))))


def blocks_of(images: Images) -> Iterator[Images]:
    """Return the images, a few megabytes at a time."""
    rows = rows_at_a_time(images.shape[1:])
    return (images[start : start + rows] for start in range(0, len(images), rows))


def content_digest(
    blocks: Iterable[Images], image_shape: Sequence[int], labels: NDArray[np.int64], class_names: Sequence[str]
) -> str:
    """Return the sha256 of a split's content, in hexadecimal; independent of the file around it."""
    digest = hashlib.sha256(json.dumps([[len(labels), *image_shape], list(class_names)]).encode())
    for block in blocks:
        digest.update(np.ascontiguousarray(block).data)
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


def write_prepared(path: Path, split: Prepared, blocks: Iterable[Images] | None = None) -> None:
    """Write a split to an HDF5 file, atomically: `image`, `label` and attributes.

    The images are one unbroken piece of the file, so that readers can map it into memory. HDF5 makes room for them and
    plain writes fill it: HDF5 itself cannot be trusted with a full disk, where it crashes when it closes its files.

    Args:
        path: the file.
        split: its content; of its images only the shape counts if there are blocks.
        blocks: the images, in order.
    """
    with atomic_path(path) as temporary:
        size = split.images.nbytes
        reserve(temporary, size + split.labels.nbytes + HEADER_BYTES)
        with h5py.File(temporary, "w", libver=("v108", "v108"), locking=False) as file:
            layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            layout.set_obj_track_times(False)  # the same bytes at any time
            space = h5py.h5s.create_simple(split.images.shape)
            offset = h5py.h5d.create(file.id, b"image", h5py.h5t.STD_U8LE, space, layout).get_offset()
            file.create_dataset("label", data=split.labels)
            facts = {name: getattr(split, name) for name in ATTRIBUTES}
            if split.view_size:
                facts["view_size"] = split.view_size
            for name, value in {**facts, "facts_digest": fingerprint(facts)}.items():
                file.attrs[name] = json.dumps(value)
        with open(temporary, "r+b") as stream:
            if size:
                stream.seek(offset)
            for block in blocks_of(split.images) if blocks is None else blocks:
                stream.write(np.ascontiguousarray(block).data)


def read_prepared(path: Path) -> Prepared:
    """Open a split and check its digest.

    Raises:
        DataError: the file is missing, truncated, changed since it was written, or its labels are unusable.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such prepared file; make it with: python -m stages.prepare")
    try:
        with read_hdf5(path) as file:
            facts = {name: json.loads(file.attrs[name]) for name in (*ATTRIBUTES, "view_size") if name in file.attrs}
            facts_digest = json.loads(file.attrs["facts_digest"])
            images, labels = _mapped(path, file["image"]), file["label"][:]
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = f"not a whole prepared file ({error})"
        raise DataError(f"{path}: {reason}; make it again: python -m stages.prepare") from None
    digest = content_digest(blocks_of(images), images.shape[1:], labels, facts["class_names"])
    if fingerprint(facts) != facts_digest or digest != facts["digest"]:
        raise DataError(f"{path}: its content does not match its digest; make it again: python -m stages.prepare")
    names = tuple(facts["class_names"])
    check_labels(labels, names, path)
    size = tuple(facts["view_size"]) if "view_size" in facts else None
    return Prepared(images, labels, names, tuple(facts["mean"]), tuple(facts["std"]), facts["digest"], size)


def read_validation(path: Path) -> Prepared | None:
    """Return the validation split, which may be empty: then there is none."""
    split = read_prepared(path)
    return split if len(split.labels) else None


def _mapped(path: Path, dataset: Any) -> Images:
    """Return the images as pages of the file; a process that writes to them changes its own copy only."""
    if dataset.dtype != np.uint8 or dataset.ndim != 4:
        raise ValueError(f"images are {dataset.dtype} of {dataset.ndim} dimensions")
    if not dataset.size:
        return np.empty(dataset.shape, np.uint8)
    offset = dataset.id.get_offset()
    if offset is None or offset + dataset.size > os.path.getsize(path):
        raise ValueError("its images are not in one piece")
    return np.memmap(path, np.uint8, "c", offset, dataset.shape)
