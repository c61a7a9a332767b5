"""How close to the boundary the converged samples of a dataset are: quantiles of margin and distance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.core.status import Status
from pipeline.shards.file import open_shard
from pipeline.shards.folder import Folder, as_folder
from pipeline.shards.format import attributes_of
from pipeline.shards.manifest import Manifest, ShardEntry
from pipeline.shards.order import shards_in_order


class Quantiles(NamedTuple):
    """Quantiles over the converged samples, in the order asked for."""

    probability_margin: list[float]
    distance: list[float]


def quantiles_of(directory: Path | Folder, manifest: Manifest, quantiles: Sequence[float]) -> Quantiles | None:
    """Return quantiles of probability margin tanh(|m| / 2) and L2 distance of converged samples; None without any.

    Reads three small columns of one shard at a time, and keeps 8 bytes of every converged sample in memory.

    Raises:
        ShardError: a shard is missing, unreadable or another one.
    """
    margin, distance = margins_and_distances(directory, manifest)
    if not len(margin):
        return None
    return Quantiles(np.quantile(margin, quantiles).tolist(), np.quantile(distance, quantiles).tolist())


def margins_and_distances(
    directory: Path | Folder, manifest: Manifest
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return probability margins and L2 distances (n,) of converged samples; memory and errors as of `quantiles_of`."""
    if not manifest.targets:
        return np.empty(0), np.empty(0)
    folder = as_folder(directory)
    found = [_converged(folder, manifest, shard) for shard in shards_in_order(manifest)]
    margin, distance = (np.concatenate(values).astype(np.float64) for values in zip(*found, strict=True))
    return np.tanh(np.abs(margin) / 2), distance


def _converged(folder: Folder, manifest: Manifest, shard: ShardEntry) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return margin and distance of the converged samples of a shard, (n,) each."""
    attributes = attributes_of(manifest.format_version, manifest.fingerprint, shard.view, shard.block)
    names = ("status", "margin", "distance")
    with open_shard(folder, shard.name, names, attributes) as file:
        columns = {name: file.read(name) for name in names}
    converged = columns["status"] == Status.CONVERGED
    return columns["margin"][converged], columns["distance"][converged]
