"""Reading shards: a map-style dataset that opens files when they are needed, and whole columns for training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.errors import ShardError
from pipeline.shard_format import ShardEntry, as_readable, check_shard, read_columns, read_manifest


class BoundaryShards(Dataset[dict[str, Tensor]]):
    """The rows of a sample dataset, one view of one image each, as tensors by column name.

    Rows are ordered by view, then by index in the training split. Besides the stored columns, a row has `samples`
    (K, C, H, W), float32: the boundary-supporting samples in pixel space (where images are embedded). `index` is
    int64.

    Files are opened when first read, once in every process, so that an instance can be given to the workers of a
    DataLoader.

    Args:
        directory: where `manifest.json` and the shards are.
        verify: check size, digest and layout of every shard first.

    Raises:
        ShardError: the dataset is missing, damaged or of an unknown version.
    """

    def __init__(self, directory: Path | str, verify: bool = True) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        if verify:
            for shard in self.manifest.shards:
                check_shard(self.directory, self.manifest, shard)
        self._shards = sorted(self.manifest.shards, key=lambda shard: (shard.view, shard.block))
        self._ends = np.cumsum([shard.rows for shard in self._shards])
        self._files: dict[str, h5py.File] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # HDF5 handles do not outlive their process

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        position = int(np.searchsorted(self._ends, row, side="right"))
        shard = self._shards[position]
        offset = row - (int(self._ends[position]) - shard.rows)
        file = self._open(shard)
        values = {name: torch.as_tensor(as_readable(file[name][offset])) for name in self.manifest.columns}
        if "image" in values:
            values["samples"] = samples_of(values["image"][None], values["delta"], values["delta_scale"])
        return values

    def shards_of_view(self, view: int) -> list[ShardEntry]:
        """The shards of a view, in order of their blocks."""
        return [shard for shard in self._shards if shard.view == view]

    def read(self, shard: ShardEntry, columns: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Whole columns of one shard, as stored, except `index`, which is int64."""
        return read_columns(self.directory / shard.name, columns)

    def _open(self, shard: ShardEntry) -> h5py.File:
        if shard.name not in self._files:
            try:
                self._files[shard.name] = h5py.File(self.directory / shard.name, "r")
            except OSError as error:
                raise ShardError(f"{self.directory / shard.name}: not a readable shard ({error})") from None
        return self._files[shard.name]


def samples_of(images: Tensor, delta: Tensor, scale: Tensor) -> Tensor:
    """Boundary-supporting samples in pixel space: image / 255 + delta * scale, not clipped.

    Args:
        images: (R, C, H, W) uint8 views.
        delta: (R, C, H, W) int8.
        scale: (R,) float32.
    """
    return images.float() / 255 + delta.float() * scale[:, None, None, None]
