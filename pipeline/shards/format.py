"""The format of a sample dataset: columns and manifest.

A dataset is a directory of HDF5 shards and a `manifest.json`. Everything here works without torch, so a check
starts at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.core.status import Status
from pipeline.images.rule import Rule, takes_boxes

# Columns of boundary-supporting samples: fields of the result of a search.
SEARCHED = ("target", "delta", "delta_scale", "boundary_logits", "margin", "distance", "status", "evaluations")
VERSIONS = (1, 2)  # a dataset has the lowest one that can say what is in it
MANIFEST = "manifest.json"
SHARD_FILES = "view-*-block-*.h5"
SHARD_NAME = r"view-\d{3,}-block-\d{5,}\.h5"


class Column(NamedTuple):
    """One column of a shard: row-first, `shape` is that of one row."""

    dtype: str
    shape: tuple[int, ...]
    meaning: str


def columns_of(
    image_shape: tuple[int, int, int],
    classes: int,
    targets: int,
    embed_images: bool,
    rule: Rule | None = None,
    image_size: Sequence[int] | None = None,
    logits: str = "float32",
    features: int = 0,
) -> dict[str, Column]:
    """Return the columns of a shard, in order.

    Args:
        image_shape: (C, H, W) of a view.
        classes: of the teacher's logits.
        targets: target classes a view; without any, there are no columns of samples.
        embed_images: whether the views are stored.
        rule: of the views; by default, crops of their size and mirror images.
        image_size: (height, width) of the images that views are cut from, where they are larger.
        logits: dtype of the teacher's logits on the views.
        features: how many penultimate features of the teacher are stored; 0 for none.
    """
    boxes = rule is not None and takes_boxes(rule, image_size or image_shape[1:], image_shape[1:])
    columns = {
        "index": Column("uint32", (), "row in the prepared training split"),
        "label": Column("int64", (), "base class"),
        "image": Column("uint8", image_shape, "the view"),
        "crop": Column("int16", (4,), "top, left, height and width of the crop in the padded image")
        if boxes
        else Column("int16", (2,), "top and left of the view in the padded image"),
        "flip": Column("uint8", (), "1 where the view is mirrored left to right"),
        "colour": Column("int16", (3,), "factors of brightness, contrast and saturation in 128ths"),
        "teacher_logits": Column(logits, (classes,), "on the view"),
        "teacher_features": Column("float16", (features,), "on the view: input of the teacher's last linear layer"),
        "target": Column("int16", (targets,), "target class, -1 without a search"),
        "delta": Column("int8", (targets, *image_shape), "perturbation divided by delta_scale"),
        "delta_scale": Column("float32", (targets,), "sample = image / 255 + delta * delta_scale"),
        "boundary_logits": Column("float32", (targets, classes), "of the teacher, at the stored sample"),
        "margin": Column("float32", (targets,), "base logit minus target logit, at the stored sample"),
        "distance": Column("float32", (targets,), "L2 norm of the perturbation in pixel space [0, 1]"),
        "status": Column("uint8", (targets,), ", ".join(f"{s.value} {s.name.lower()}" for s in Status)),
        "evaluations": Column("uint16", (targets,), "gradient evaluations of the search"),
    }
    if not embed_images:
        del columns["image"]
    if rule is None or not any(rule.jitter):
        del columns["colour"]
    if not features:
        del columns["teacher_features"]
    if not targets:
        for name in SEARCHED:
            del columns[name]
    return columns


def version_of(columns: Mapping[str, Column]) -> int:
    """Return the format version of a dataset with these columns."""
    as_first = columns["crop"].shape == (2,) and columns["teacher_logits"].dtype == "float32"
    return 1 if as_first and "target" in columns and "teacher_features" not in columns else 2


def shard_name(view: int, block: int) -> str:
    """Return the file name of a shard."""
    return f"view-{view:03d}-block-{block:05d}.h5"


def count_statuses(columns: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Return how many samples of a shard ended in each status, by name; `columns` has `status`, if the shard has."""
    status = columns.get("status", np.empty(0, np.uint8))
    return {s.name.lower(): int(np.count_nonzero(status == s)) for s in Status}


def attributes_of(version: int, fingerprint: str, view: int, block: int) -> dict[str, Any]:
    """Return the attributes of a shard."""
    return {"format_version": version, "fingerprint": fingerprint, "view": view, "block": block}
