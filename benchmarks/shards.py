"""Shards: what each codec costs in bytes and time, beside raw reads of the same files; and growth with their number."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.measuring import WEIGHTS, Spread, first_images, publish, real_teacher, real_train, seconds_of, table
from pipeline.attack import Block, Search
from pipeline.attack_run import SampleDataset
from pipeline.config import load_params
from pipeline.data import Prepared, write_prepared
from pipeline.presets import configure
from pipeline.provenance import ROOT
from pipeline.shard_reader import BoundaryShards
from pipeline.storage import Store, file_digest
from pipeline.weights import save_weights

CPU = torch.device("cpu")
SHARDS, ROWS = 32, 1024
SIZES = (1000, 2000, 4000, 8000, 16000)
BATCH = 256


@click.command()
@click.option("--runs", default=5, show_default=True, help="Of each codec.")
@click.option(
    "--growth/--no-growth", default=True, show_default=True, help="Also the attack on 1,000 to 16,000 images."
)
def main(runs: int, growth: bool) -> None:
    """Write, read and publish shards of real samples.

    Example: python -m benchmarks.shards
    """
    train = real_train(max(ROWS, max(SIZES) if growth else 0))
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=ROOT / ".work" if (ROOT / ".work").is_dir() else None) as folder:
        records += _codecs(train, Path(folder), runs)
        text = table([_codec_row(record) for record in records])
        if growth:
            grown = [_attack(train, count, Path(folder)) for count in tqdm(SIZES, desc="growth", disable=None)]
            records += grown
            text += "\n\n" + table([_growth_row(record) for record in grown]) + f"\n\n{_slope(grown)}"
    publish("shards", CPU, records, text)


def _codecs(train: Prepared, folder: Path, runs: int) -> list[dict[str, Any]]:
    """Rates of each codec, measured in turn on the same rows."""
    params = load_params(ROOT / "params.yaml")
    search = Search(real_teacher(CPU), params.attack, params.dataset, CPU, 128)
    values = search.shard_values(train, Block(0, 0, 0, ROWS))
    rates: dict[str, dict[str, list[float]]] = {}
    size: dict[str, int] = {}
    for run in tqdm(range(runs), desc="codecs", disable=None):
        for codec in ("none", "lzf", "gzip"):
            attack = params.attack.model_copy(update={"compression": codec, "views": SHARDS, "rows_per_shard": ROWS})
            store = Store(folder / f"store-{codec}")
            dataset = SampleDataset(first_images(train, ROWS), params.dataset, attack, file_digest(WEIGHTS), store)
            found = rates.setdefault(codec, {})
            megabytes = sum(array.nbytes for array in values.values()) * SHARDS / 1e6
            seconds, _ = seconds_of(partial(list, dataset.make(Found(values), dataset.blocks)), CPU)
            found.setdefault("write", []).append(megabytes / seconds)
            if run == 0:
                dataset.publish(folder / codec)
            shards = BoundaryShards(folder / codec, verify=False)
            size[codec] = shards.manifest.totals.bytes
            names = [folder / codec / shard.name for shard in shards.manifest.shards]
            seconds, _ = seconds_of(partial(_raw, names), CPU)
            found.setdefault("raw", []).append(size[codec] / 1e6 / seconds)
            seconds, _ = seconds_of(partial(_columns, shards), CPU)
            found.setdefault("sequential", []).append(megabytes / seconds)
            rows = list(range(len(shards)))
            for name, wanted in (("in order", rows), ("random", random.Random(run).sample(rows, 8192))):
                seconds, count = seconds_of(partial(_batches, shards, wanted), CPU)
                found.setdefault(name, []).append(count / seconds)
    return [
        {"codec": codec, "bytes_per_row": size[codec] / SHARDS / ROWS}
        | {name: Spread.of(values)._asdict() for name, values in found.items()}
        for codec, found in rates.items()
    ]


class Found(Search):
    """A search that is done: the same values for every block."""

    def __init__(self, values: dict[str, NDArray[Any]]) -> None:
        self.values = values

    def shard_values(self, train: Prepared, block: Block) -> dict[str, NDArray[Any]]:
        """What was found."""
        return self.values


def _raw(paths: list[Path]) -> int:
    """Read whole files, into memory that is fresh each time, as the reader of columns does."""
    total = 0
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            content = np.empty(path.stat().st_size, np.uint8)
            total += file.readinto(content.data) or 0
    return total


def _columns(shards: BoundaryShards) -> None:
    for shard in shards.manifest.shards:
        shards.read(shard, shards.manifest.columns)


def _batches(shards: BoundaryShards, rows: list[int]) -> int:
    for first in range(0, len(rows), BATCH):
        shards.__getitems__(rows[first : first + BATCH])
    return len(rows)


def _attack(train: Prepared, count: int, folder: Path) -> dict[str, Any]:
    """The attack stage on so many images, one view, in a process of its own."""
    project = folder / f"growth-{count}"
    write_prepared(project / "data/prepared/train.h5", first_images(train, count))
    save_weights(real_teacher(CPU), project / "models/teacher.safetensors")
    (project / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    configure(project / "params.yaml", ["attack.views=1", "dataset.padding=4", "dataset.flip=true"])
    begin, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.attack"], cwd=project, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise click.ClickException(f"the attack on {count} images failed")
    return {"images": count, "seconds": time.perf_counter() - begin, "peak_mib": peak}


def _memory(process: int) -> float:
    """MiB of a process and its forks, pages that they share counted once."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        whole = psutil.Process(process)
        for each in (whole, *whole.children(recursive=True)):
            total += each.memory_full_info().pss / 2**20
    return total


def _codec_row(record: dict[str, Any]) -> dict[str, str]:
    def spread(name: str) -> str:
        return Spread(**record[name]).text()

    return {
        "codec": record["codec"],
        "bytes a row": f"{record['bytes_per_row']:,.0f}",
        "write, MB/s": spread("write"),
        "raw read of the files, MB/s": spread("raw"),
        "whole columns, MB/s": spread("sequential"),
        "rows/s in order": spread("in order"),
        "rows/s at random": spread("random"),
    }


def _growth_row(record: dict[str, Any]) -> dict[str, str]:
    return {
        "images": f"{record['images']:,}",
        "attack stage, s": f"{record['seconds']:.1f}",
        "images/s": f"{record['images'] / record['seconds']:.0f}",
        "memory at most, MiB": f"{record['peak_mib']:.0f}",
    }


def _slope(records: list[dict[str, Any]]) -> str:
    images, seconds = (np.log([record[name] for record in records]) for name in ("images", "seconds"))
    slope = np.polyfit(images, seconds, 1)[0]
    return f"Slope of log time against log images, start of the process included: {slope:.3f}."


if __name__ == "__main__":
    main()
