"""Is a dataset whole, and is what is in it possible? Its files may come from a stranger."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.byte_source import Folder, LocalFolder, digest_of
from pipeline.errors import ShardError
from pipeline.shard_file import ChunkCache, ShardFile, open_shard
from pipeline.shard_format import Manifest, ShardEntry, attributes_of, count_statuses
from pipeline.status import Status

# Columns whose values are looked at; image and delta may hold anything.
SMALL = (
    "label",
    "crop",
    "flip",
    "teacher_logits",
    "target",
    "delta_scale",
    "boundary_logits",
    "margin",
    "distance",
    "status",
)
CLOSE = 1e-3  # relative to the logits: rounding of a margin


def check_shard(directory: Path | Folder, manifest: Manifest, shard: ShardEntry) -> None:
    """Check one file against the manifest: size and digest first, then how it is stored, then its values.

    Raises:
        ShardError: names the file and what is wrong.
    """
    folder = LocalFolder(directory) if isinstance(directory, Path) else directory
    checked_shard(folder, manifest, shard).close()


def checked_shard(folder: Folder, manifest: Manifest, shard: ShardEntry, cache: ChunkCache | None = None) -> ShardFile:
    """As `check_shard`; returns the file, still open: what is read of it later is what was checked."""
    path = f"{folder}/{shard.name}"
    with contextlib.ExitStack() as stack:
        try:
            source = folder.open(shard.name)
            stack.callback(source.close)
            if source.size != shard.bytes:
                raise ShardError(f"{path}: has {source.size} bytes, the manifest says {shard.bytes}")
            if digest_of(source) != shard.sha256:
                raise ShardError(f"{path}: its sha256 is not the manifest's: the content has changed")
        except FileNotFoundError:
            raise ShardError(f"{path}: missing") from None
        except OSError as error:
            raise ShardError(f"{path}: cannot be read ({error})") from None
        file = ShardFile(source, path, None, attributes_of(manifest.fingerprint, shard.view, shard.block), cache)
        check_contents(file, manifest, shard)
        stack.pop_all()  # it stays open
    return file


def check_contents(file: ShardFile, manifest: Manifest, shard: ShardEntry) -> None:
    """The part of `check_shard` that looks into an open file: its columns, then their values."""
    check_layout(file, manifest, shard)
    file.check_chunks()
    _check_values({name: file.read(name) for name in SMALL}, manifest, shard, file.place)


def check_layout(file: ShardFile, manifest: Manifest, shard: ShardEntry) -> None:
    """Refuse a file whose columns are not those of the manifest, in dtype and shape."""
    different = sorted(set(file.names) ^ set(manifest.columns))
    if different:
        raise ShardError(f"{file.place}: columns are not the manifest's: {', '.join(map(ascii, different))}")
    for name, column in manifest.columns.items():
        expected = np.dtype(column.dtype), (shard.rows, *column.shape)
        if file.layout(name) != expected:
            given = " ".join(map(str, file.layout(name)))
            raise ShardError(f"{file.place}: column '{name}' is {given}, expected {' '.join(map(str, expected))}")


def _check_values(columns: dict[str, NDArray[Any]], manifest: Manifest, shard: ShardEntry, path: str) -> None:
    classes, status = len(manifest.class_names), columns["status"]
    label, target = columns["label"], columns["target"].astype(np.int64)
    done = status == Status.CONVERGED
    logits, margin = columns["boundary_logits"], columns["margin"]

    def within(name: str, lowest: float, largest: float) -> bool:
        return bool(((columns[name] >= lowest) & (columns[name] <= largest)).all())

    largest_crop = 2 * manifest.augmentation.padding
    sound = {
        "label": within("label", 0, classes - 1),
        "crop": within("crop", 0, largest_crop),
        "flip": within("flip", 0, int(manifest.augmentation.flip)),
        "status": within("status", 0, max(Status)),
        "target": within("target", -1, classes - 1) and not (done & (target < 0)).any(),
        "teacher_logits": bool(np.isfinite(columns["teacher_logits"]).all()),
        "boundary_logits": bool(np.isfinite(logits[done]).all()),
    }
    for name in ("delta_scale", "distance"):
        sound[name] = bool((np.isfinite(columns[name]) & (columns[name] >= 0))[done].all())
    for name, is_sound in sound.items():
        if not is_sound:
            raise ShardError(f"{path}: column '{name}' holds values that are not possible")
    if (done & (target == label[:, None])).any():
        raise ShardError(f"{path}: column 'target' names the base class")
    pair = np.stack([np.broadcast_to(label[:, None], target.shape), np.maximum(target, 0)], -1)
    base, other = np.moveaxis(np.take_along_axis(logits, pair, -1), -1, 0)
    if not (np.abs(base - other - margin) <= CLOSE * (1 + np.abs(base)))[done].all():
        raise ShardError(f"{path}: column 'margin' is not the difference of the logits")
    if count_statuses(status) != shard.statuses:
        raise ShardError(f"{path}: column 'status' does not count as the manifest says")


def find_problems(directory: Path, manifest: Manifest) -> list[str]:
    """Check every file of a dataset; one sentence for each that is wrong, none for a whole dataset."""
    problems = []
    for shard in manifest.shards:
        try:
            check_shard(directory, manifest, shard)
        except ShardError as error:
            problems.append(str(error))
    listed = {shard.name for shard in manifest.shards}
    problems += [f"{path}: not in the manifest" for path in sorted(directory.glob("*.h5")) if path.name not in listed]
    return problems


def is_shard(path: Path, fingerprint: str, view: int, block: int) -> bool:
    """Whether a file says of itself that it is a certain shard."""
    try:
        with open_shard(LocalFolder(path.parent), path.name, [], attributes_of(fingerprint, view, block)):
            return True
    except ShardError:
        return False
