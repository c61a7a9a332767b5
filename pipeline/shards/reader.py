"""Reading shards: a map-style dataset that opens files when they are needed, and whole columns for training."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.core.errors import ShardError
from pipeline.images.pixels import pixels
from pipeline.images.prepared import Prepared
from pipeline.images.views import apply_views
from pipeline.shards.check import check_layout, checked_shard
from pipeline.shards.file import ChunkCache, ShardFile, open_shard
from pipeline.shards.folder import folder_at
from pipeline.shards.format import attributes_of
from pipeline.shards.manifest import Manifest, ShardEntry, read_manifest
from pipeline.shards.order import shards_in_order

CACHE_BYTES = 1 << 28  # of decompressed chunks, in each process
OPEN_FILES = 512  # at most, of each dataset in each process; it costs a millisecond to open one
VIEW_COLUMNS = ("crop", "flip", "colour")  # by which a view is cut from its image again
BYTES_PER_READ = 1 << 15  # what can be read in the time that one more read takes


class BoundaryShards(Dataset[dict[str, Tensor]]):
    """The rows of a sample dataset, one view of one image each, as tensors by column name.

    Rows are ordered by view, then by index in the training split. Besides the stored columns, a row has `samples`
    (K, C, H, W), float32: the boundary-supporting samples in pixel space (where images are embedded, and the dataset
    has target classes). `index` is int64.

    Files are opened when first read, once in every process, so that an instance can be given to the workers of a
    DataLoader.

    Args:
        directory: where `manifest.json` and the shards are: a path, or a URL of any file system of fsspec, as
            s3://bucket/folder or https://host/folder, of which only what is read is fetched.
        verify: check size, digest, layout and values of every shard first; by default of a path. Of a URL, that the
            columns are those of the manifest is checked when a shard is opened, and digests are not.

    Raises:
        ShardError: the dataset is missing, damaged or of an unknown version.
    """

    def __init__(self, directory: Path | str, verify: bool | None = None) -> None:
        self.folder = folder_at(directory)
        self.directory = str(self.folder)
        self.manifest = read_manifest(self.folder)
        self._shards = shards_in_order(self.manifest)
        self._ends = np.cumsum([shard.rows for shard in self._shards])
        self._row_bytes = {
            name: np.dtype(c.dtype).itemsize * prod(c.shape) for name, c in self.manifest.columns.items()
        }
        self._files: dict[str, ShardFile] = {}
        self._lock = threading.Lock()
        self._cache = ChunkCache(CACHE_BYTES)
        if verify or (verify is None and not self.folder.is_remote):
            for shard in self.manifest.shards:
                self._keep(shard, checked_shard(self.folder, self.manifest, shard, self._cache))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}, "_lock": None}  # which do not outlive their process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return several rows, as a DataLoader asks for them; rows that lie close together are read at once."""
        places = np.array([self._checked(row) for row in rows], np.int64)
        positions = np.searchsorted(self._ends, places, side="right")
        items: list[dict[str, Tensor]] = [{}] * len(places)
        for position in np.unique(positions):
            shard = self._shards[position]
            (wanted,) = np.nonzero(positions == position)
            columns = self._read_rows(shard, places[wanted] - (int(self._ends[position]) - shard.rows))
            for number, item in enumerate(wanted):
                items[item] = {name: column[number] for name, column in columns.items()}
        return items

    def _checked(self, row: int) -> int:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return row % len(self)

    def _read_rows(self, shard: ShardEntry, offsets: NDArray[np.int64]) -> dict[str, Tensor]:
        """Return rows of one shard, with their samples."""
        file, first, end = self._open(shard), int(offsets.min()), int(offsets.max()) + 1
        values = {}
        for name, row_bytes in self._row_bytes.items():
            if (end - first) * row_bytes <= len(offsets) * BYTES_PER_READ:
                array = file.read(name, first, end)[offsets - first]
            else:
                array = np.concatenate([file.read(name, offset, offset + 1) for offset in offsets.tolist()])
            values[name] = torch.from_numpy(array)
        return with_samples(values)

    def place(self, row: int) -> tuple[ShardEntry, int]:
        """Return the shard that a row is in, and the row's number there."""
        position = int(np.searchsorted(self._ends, self._checked(row), side="right"))
        shard = self._shards[position]
        return shard, self._checked(row) - (int(self._ends[position]) - shard.rows)

    def read(self, shard: ShardEntry, columns: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Return whole columns of one shard, as stored, except `index`, which is int64."""
        file = self._open(shard)
        return {name: file.read(name) for name in columns}

    def _open(self, shard: ShardEntry) -> ShardFile:
        """Return the shard's file, opened when it is not among those that were read last."""
        with self._lock:
            file = self._files.pop(shard.name, None)
        if file is None:
            # Its attributes say whether the directory has been replaced by another dataset since it was checked.
            attributes = attributes_of(self.manifest.format_version, self.manifest.fingerprint, shard.view, shard.block)
            file = open_shard(self.folder, shard.name, self.manifest.columns, attributes, self._cache)
            check_layout(file, self.manifest, shard)
        return self._keep(shard, file)

    def _keep(self, shard: ShardEntry, file: ShardFile) -> ShardFile:
        with self._lock:
            while len(self._files) >= most_open_files():
                self._files.pop(next(iter(self._files)))  # closed when no other thread reads it
            self._files[shard.name] = file
        return file


def most_open_files() -> int:
    """Return how many files a dataset may keep open: a quarter of what this process may have."""
    return max(1, min(OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))


def with_samples(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return columns of rows, and `samples`, where images are embedded and there are samples."""
    if "image" not in columns or "delta" not in columns:
        return columns
    return columns | {"samples": samples_of(columns["image"][:, None], columns["delta"], columns["delta_scale"])}


def check_train(directory: str, manifest: Manifest, train: Prepared | None) -> None:
    """Refuse what is not the prepared training split from which the views of a dataset can be cut again.

    Raises:
        ShardError: there is none, or it is another one.
    """
    if train is None:
        raise ShardError(
            f"{directory}: the shards do not embed their images (attack.embed_images), so the prepared training data "
            "is needed"
        )
    if train.digest != manifest.digests.train:
        raise ShardError(f"{directory}: the shards were made from other training data")
    size = manifest.augmentation.image_size or manifest.image_shape[1:]
    if train.images.shape[1:] != (manifest.image_shape[0], *size):
        raise ShardError(f"{directory}: its views are not of images as large as the training data's")


def views_again(images: Tensor, columns: Mapping[str, Tensor], manifest: Manifest) -> Tensor:
    """Return the views (N, C, h, w) uint8 that were cut from images.

    Args:
        images: (N, C, H, W) uint8, of the training split.
        columns: those of N rows that say how: `crop`, `flip` and, where there is one, `colour`.
        manifest: of the dataset.
    """
    colour = columns.get("colour", torch.empty(len(images), 0))
    padding, size = manifest.augmentation.padding, manifest.image_shape[1:]
    return apply_views(images, columns["crop"], columns["flip"], colour, padding, size)


def samples_of(images: Tensor, delta: Tensor, scale: Tensor) -> Tensor:
    """Return boundary-supporting samples in pixel space: image / 255 + delta * scale, not clipped.

    Args:
        images: (..., C, H, W) uint8 views.
        delta: (..., C, H, W) int8.
        scale: (...) float32.

    Example:
        >>> image, delta = torch.tensor([[[255, 0]]], dtype=torch.uint8), torch.tensor([[[-127, 64]]], dtype=torch.int8)
        >>> samples_of(image, delta, torch.tensor(0.001))
        tensor([[[0.8730, 0.0640]]])
    """
    return pixels(images) + delta.float() * scale[..., None, None, None]
