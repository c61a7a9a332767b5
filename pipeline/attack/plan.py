"""What an attack would cost: shards, bytes and time, without making any."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.attack.dataset import SampleDataset
from pipeline.core.files import existing_parent
from pipeline.search.teacher_search import TeacherSearch

CALIBRATION_SECONDS = 2.0  # the shortest measurement to trust


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The cost of a sample dataset as its parameters ask for it."""

    shards: int
    """Of the whole dataset."""
    missing: int
    """Shards that would be made; the others are in the store."""
    views: int
    """Rows of the missing shards: views of images that would be searched."""
    bytes: int
    """One copy of the whole dataset."""
    free: int
    """Bytes, on the disk of the store."""
    rate: float
    """Views per second that one worker like this process searches."""


def plan_attack(dataset: SampleDataset, search: TeacherSearch) -> Plan:
    """Count what a dataset lacks, and measure the search on a few views, which are not kept."""
    missing = set(dataset.missing())
    stored = [entry for block in dataset.blocks if block not in missing and (entry := dataset.entry(block))]
    views = sum(block.rows for block in missing)
    rate, row_bytes = _measure(dataset, search)
    return Plan(
        shards=len(dataset.blocks),
        missing=len(missing),
        views=views,
        bytes=sum(entry.bytes for entry in stored) + round(views * row_bytes),
        free=shutil.disk_usage(existing_parent(dataset.store.root / "any")).free,
        rate=rate,
    )


def _measure(dataset: SampleDataset, search: TeacherSearch) -> tuple[float, float]:
    """Return views per second, and bytes per view, from ever larger parts of the first shard."""
    whole = dataset.blocks[0]
    rows = min(whole.rows, 16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.h5"
        while True:
            begin = time.perf_counter()
            part = whole._replace(rows=rows)
            dataset.write(path, part, dataset.values(search, part))
            seconds = time.perf_counter() - begin
            if rows == whole.rows or seconds > CALIBRATION_SECONDS:
                return rows / seconds, path.stat().st_size / rows
            rows = min(whole.rows, 4 * rows)
