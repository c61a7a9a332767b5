"""Is a dataset whole, and is what is in it possible? Its files may come from a stranger."""

from __future__ import annotations

import contextlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import ShardError, shown
from pipeline.core.status import Status
from pipeline.shards.file import ChunkCache, ShardFile
from pipeline.shards.folder import Folder, LocalFolder, as_folder, digest_of
from pipeline.shards.format import attributes_of, count_statuses
from pipeline.shards.manifest import Manifest, ShardEntry

# Columns whose values are looked at: of views and samples, all rows at once; then of samples, a few rows at a time.
VIEWS = ("index", "label", "crop", "flip", "teacher_logits", "teacher_features")
SEARCHES = ("label", "target", "delta_scale", "boundary_logits", "margin", "distance", "status")
SAMPLES = ("image", "delta", "delta_scale", "distance", "status")
BLOCK_BYTES = 1 << 22  # of samples in memory
CLOSE = 1e-3  # relative to the logits: rounding of a margin


def check_shard(directory: Path | Folder, manifest: Manifest, shard: ShardEntry) -> None:
    """Check one file against the manifest: size and digest first, then how it is stored, then its values.

    Raises:
        ShardError: names the file and what is wrong.
    """
    folder = as_folder(directory)
    checked_shard(folder, manifest, shard).close()


def checked_shard(folder: Folder, manifest: Manifest, shard: ShardEntry, cache: ChunkCache | None = None) -> ShardFile:
    """Check a file as `check_shard` does, and return it open: what is read of it later is what was checked."""
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
        file = ShardFile(
            source,
            path,
            None,
            attributes_of(manifest.format_version, manifest.fingerprint, shard.view, shard.block),
            cache,
        )
        check_contents(file, manifest, shard)
        stack.pop_all()  # it stays open
    return file


def check_contents(file: ShardFile, manifest: Manifest, shard: ShardEntry) -> None:
    """Look into an open file: check its columns, then their values."""
    check_layout(file, manifest, shard)
    file.check_chunks()
    _check_views({name: file.read(name) for name in VIEWS if name in file.names}, manifest, shard, file.place)
    if manifest.targets:
        _check_searches({name: file.read(name) for name in SEARCHES}, manifest, shard, file.place)
        _check_samples(file, manifest, shard)


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


def _check_views(columns: dict[str, NDArray[Any]], manifest: Manifest, shard: ShardEntry, path: str) -> None:
    """Refuse values of views that no attack gives."""
    sound = {
        "index": _is_index(columns["index"], manifest, shard),
        "label": _within(columns["label"], 0, len(manifest.class_names) - 1),
        "crop": bool(are_crops(columns["crop"], manifest).all()),
        "flip": _within(columns["flip"], 0, int(manifest.augmentation.flip)),
        "teacher_logits": bool(np.isfinite(columns["teacher_logits"]).all()),
        "teacher_features": bool(np.isfinite(columns.get("teacher_features", 0)).all()),
    }
    _refuse_unsound(sound, path)


def _within(values: NDArray[Any], lowest: float, largest: float) -> bool:
    return bool(((values >= lowest) & (values <= largest)).all())


def _refuse_unsound(sound: dict[str, bool], path: str) -> None:
    for name, is_sound in sound.items():
        if not is_sound:
            raise ShardError(f"{path}: column '{name}' holds values that are not possible")


def _check_searches(columns: dict[str, NDArray[Any]], manifest: Manifest, shard: ShardEntry, path: str) -> None:
    """Refuse values of samples that no attack gives; perturbations are looked at by `_check_samples`."""
    classes, status = len(manifest.class_names), columns["status"]
    label, target = columns["label"], columns["target"].astype(np.int64)
    done, skipped = status == Status.CONVERGED, status == Status.BASE_MISCLASSIFIED
    logits, margin = columns["boundary_logits"], columns["margin"]

    ordered = np.sort(target, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    finite = np.isfinite(logits).all(-1) & np.isfinite(margin)
    sound = {
        "status": _within(status, 0, max(Status)),
        "target": _within(target, -1, classes - 1) and np.array_equal(target < 0, skipped) and not repeated.any(),
        "boundary_logits": bool((finite | (status == Status.BAD_GRADIENT)).all()),
        "delta_scale": _within(columns["delta_scale"], 0, 1) and not columns["delta_scale"][skipped].any(),
        "distance": _within(columns["distance"], 0, 1e9) and not columns["distance"][skipped].any(),
    }
    _refuse_unsound(sound, path)
    if ((target == label[:, None]) & ~skipped).any():
        raise ShardError(f"{path}: column 'target' names the base class")
    pair = np.stack([np.broadcast_to(label[:, None], target.shape), np.maximum(target, 0)], -1)
    base, other = np.moveaxis(np.take_along_axis(logits, pair, -1), -1, 0)
    if not (np.abs(base - other - margin) <= CLOSE * (1 + np.abs(base)))[done].all():
        raise ShardError(f"{path}: column 'margin' is not the difference of the logits")
    others = logits.copy()
    np.put_along_axis(others, pair, -np.inf, -1)
    on_top = others.max(-1, initial=-np.inf) <= np.minimum(base, other) + CLOSE
    if not (on_top & (np.tanh(np.abs(margin) / 2) <= tolerance_of(manifest) + CLOSE))[done].all():
        raise ShardError(f"{path}: column 'status' says of samples that are off the boundary that they converged")
    if count_statuses(columns) != shard.statuses:
        raise ShardError(f"{path}: column 'status' does not count as the manifest says")


def are_crops(crop: NDArray[np.int16], manifest: Manifest) -> NDArray[np.bool_]:
    """Return of crops, (n, 2) or (n, 4), which of them lie within the padded images (n,)."""
    crop, given = crop.astype(np.int64), manifest.augmentation
    padded = np.array(given.image_size or manifest.image_shape[1:]) + 2 * given.padding
    size = crop[:, 2:] if crop.shape[1] == 4 else np.array(manifest.image_shape[1:])
    within: NDArray[np.bool_] = np.all((crop[:, :2] >= 0) & (size >= 1) & (crop[:, :2] + size <= padded), axis=1)
    return within


def _is_index(index: NDArray[np.int64], manifest: Manifest, shard: ShardEntry) -> bool:
    """Return whether rows are those of the block; a preview has some of them, in any block."""
    if manifest.is_sample:
        return bool((index < 2**31).all())
    start = manifest.starts[shard.view, shard.block]
    return np.array_equal(index, np.arange(start, start + shard.rows))


def tolerance_of(manifest: Manifest) -> float:
    """Return the largest probability margin of a converged sample, as the manifest says; else any."""
    tolerance = _attack_parameter(manifest, "tolerance")
    return float(tolerance) if isinstance(tolerance, float | int) else 1.0


def _attack_parameter(manifest: Manifest, name: str) -> Any:
    attack = manifest.parameters.get("attack")
    return attack.get(name) if isinstance(attack, dict) else None


def _check_samples(file: ShardFile, manifest: Manifest, shard: ShardEntry) -> None:
    """Refuse perturbations that are not as long as `distance` says, and samples that are no images."""
    # The rule of Heo et al. leaves the box [0, 1].
    bounded = not str(_attack_parameter(manifest, "search")).startswith("heo2019")
    step = max(1, BLOCK_BYTES // (4 * manifest.targets * prod(manifest.image_shape)))
    for first in range(0, shard.rows, step):
        rows = {name: file.read(name, first, first + step) for name in SAMPLES if name in manifest.columns}
        scale, done = rows["delta_scale"], rows["status"] == Status.CONVERGED
        delta = rows["delta"] * scale[..., None, None, None]
        length = np.sqrt(np.einsum("rkchw,rkchw->rk", delta, delta))
        if not np.isclose(length, rows["distance"], rtol=CLOSE, atol=CLOSE)[done].all():
            raise ShardError(f"{file.place}: column 'distance' is not the length of the perturbations")
        if bounded and "image" in rows:
            delta += rows["image"][:, None] / np.float32(255)
            slack = 0.51 * scale + CLOSE
            inside = (delta.min((2, 3, 4)) >= -slack) & (delta.max((2, 3, 4)) <= 1 + slack)
            if not inside[done].all():
                raise ShardError(f"{file.place}: column 'delta' leads out of the image")


def find_problems(directory: Path | Folder, manifest: Manifest) -> list[str]:
    """Check every file of a dataset; one sentence for each that is wrong, none for a whole dataset."""
    folder = as_folder(directory)
    problems = []
    for shard in manifest.shards:
        try:
            check_shard(folder, manifest, shard)
        except ShardError as error:
            problems.append(str(error))
    listed = {shard.name for shard in manifest.shards}
    if isinstance(folder, LocalFolder):  # servers do not list what they have
        others = sorted(path for path in folder.path.glob("*.h5") if path.name not in listed)
        problems += [f"{folder}/{shown(path.name)}: not in the manifest" for path in others]
    return problems


def check_same_data(directory: Path, manifest: Manifest, train: str, prepared: Path) -> None:
    """Refuse shards of other training images than the prepared ones: one table would have two datasets.

    Args:
        directory: of the shards.
        manifest: theirs.
        train: digest of the prepared training split.
        prepared: directory of the prepared splits.

    Raises:
        ShardError: the digests differ.
    """
    if manifest.digests.train != train:
        raise ShardError(
            f"{directory}: was made from other training images than those in {prepared}: make it anew with "
            "python -m stages.attack, or prepare the images it is of; --other-data compares them all the same"
        )
