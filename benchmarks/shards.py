"""Shards: what each codec costs in bytes and time, beside raw reads of the same files; and growth with their number."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.measuring import (
    Spread,
    first_images,
    loaded_teacher,
    publish,
    real_teacher,
    real_train,
    seconds_of,
    table,
)
from pipeline.attack.columns import Block, shard_values
from pipeline.attack.dataset import SampleDataset
from pipeline.configure import configure
from pipeline.core.parameters import load_params
from pipeline.core.provenance import ROOT
from pipeline.core.store import Store
from pipeline.images.prepared import Prepared, read_prepared, write_prepared
from pipeline.machine.device import keep_freed_memory, search_batch, side_by_side
from pipeline.machine.forks import run_in_forks
from pipeline.networks.weights import save_weights
from pipeline.search.table import search_of
from pipeline.shards.reader import BoundaryShards

CPU = torch.device("cpu")
SHARDS, ROWS = 32, 1024
SIZES = (1000, 2000, 4000, 8000, 16000)
BATCH = 256
LARGE = 4000  # images: from here on, what every run does once hardly counts


@click.command()
@click.option("--runs", default=5, show_default=True, help="Of each measurement, in turn.")
@click.option(
    "--growth/--no-growth", default=True, show_default=True, help="Also the attack on 1,000 to 16,000 images."
)
@click.option("--large", default=0, show_default=True, help="Also the attack on so many images, once, for its memory.")
def main(runs: int, growth: bool, large: int) -> None:
    """Write, read and publish shards of real samples; run the attack stage on ever more images.

    Example: python -m benchmarks.shards
    """
    torch.set_num_threads(1)  # as in the stage, whose forks have one each
    keep_freed_memory()
    train = real_train(max(ROWS, max(SIZES) if growth else 0, large))
    records: list[dict[str, Any]] = []
    (ROOT / ".work").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / ".work") as folder:
        records += _codecs(train, Path(folder), runs)
        text = table([_codec_row(record) for record in records])
        if growth:
            grown = _growth(train, Path(folder), runs)
            if large:
                grown.append(_large(train, large, Path(folder)))
            workers = _workers(train, Path(folder), runs)
            records += grown + workers
            text += "\n\n" + table([_growth_row(record) for record in grown]) + f"\n\n{_slope(grown)}"
            text += "\n\n" + table([_workers_row(record) for record in workers])
    publish("shards", CPU, records, text)


def _codecs(train: Prepared, folder: Path, runs: int) -> list[dict[str, Any]]:
    """Return rates of each codec, measured in turn on the same rows."""
    params = load_params(ROOT / "params.yaml")
    teacher = loaded_teacher(CPU)
    search = search_of(teacher.model, params.search, 128, CPU)
    values = shard_values(search, train, Block(0, 0, 0, ROWS), params.views, params.attack)
    rates: dict[str, dict[str, list[float]]] = {}
    size: dict[str, int] = {}
    for run in tqdm(range(runs), desc="codecs", disable=None):
        for codec in ("none", "gzip"):
            attack = params.attack.model_copy(update={"compression": codec, "views": SHARDS, "rows_per_shard": ROWS})
            store = Store(folder / f"store-{codec}")
            coded = params.model_copy(update={"attack": attack})
            dataset = SampleDataset.of(first_images(train, ROWS), coded, teacher, store)
            found = rates.setdefault(codec, {})
            megabytes = sum(array.nbytes for array in values.values()) * SHARDS / 1e6
            seconds, _ = seconds_of(partial(_keep, dataset, values), CPU)
            found.setdefault("write", []).append(megabytes / seconds)
            if run == 0:
                dataset.publish(folder / codec)
            shards = BoundaryShards(folder / codec)
            size[codec] = shards.manifest.totals.bytes
            names = [folder / codec / shard.name for shard in shards.manifest.shards]
            seconds, _ = seconds_of(partial(_raw, names), CPU)
            found.setdefault("raw", []).append(size[codec] / 1e6 / seconds)
            for name, reader in (("opened", BoundaryShards(folder / codec, verify=False)), ("checked", shards)):
                seconds, _ = seconds_of(partial(_columns, reader), CPU)
                found.setdefault(name, []).append(megabytes / seconds)
            rows = list(range(len(shards)))
            for name, wanted in (("in order", rows), ("random", random.Random(run).sample(rows, 8192))):
                seconds, count = seconds_of(partial(_batches, shards, wanted), CPU)
                found.setdefault(name, []).append(count / seconds)
    return [
        {"codec": codec, "bytes_per_row": size[codec] / SHARDS / ROWS}
        | {name: Spread.of(values)._asdict() for name, values in found.items()}
        for codec, found in rates.items()
    ]


def _keep(dataset: SampleDataset, values: dict[str, NDArray[Any]]) -> None:
    """Write the same values for every block."""
    for block in dataset.blocks:
        dataset.keep(block, values)


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


def _growth(train: Prepared, folder: Path, runs: int) -> list[dict[str, Any]]:
    """Measure the attack stage on ever more images: the command, the same with nothing to do, searching alone."""
    projects = {count: _project(train, count, folder) for count in SIZES}
    found: dict[int, dict[str, list[float]]] = {count: {} for count in SIZES}
    for _ in tqdm(range(runs), desc="growth", disable=None):
        for count, project in projects.items():
            shutil.rmtree(project / ".work", ignore_errors=True)
            stage, idle, search = _stage(project), _stage(project), _search_alone(project)
            for name, value in (
                ("stage", stage.seconds),
                ("idle", idle.seconds),
                ("work", stage.seconds - idle.seconds),
                ("search", search),
                ("over search", stage.seconds / search),
                ("peak_mib", stage.peak),
            ):
                found[count].setdefault(name, []).append(value)
    return [
        {"images": count} | {name: Spread.of(each)._asdict() for name, each in values.items()}
        for count, values in found.items()
    ]


def _large(train: Prepared, count: int, folder: Path) -> dict[str, Any]:
    stage = _stage(_project(train, count, folder))
    return {
        "images": count,
        "stage": Spread.of([stage.seconds])._asdict(),
        "peak_mib": Spread.of([stage.peak])._asdict(),
    }


def _workers(train: Prepared, folder: Path, runs: int, count: int = 4000) -> list[dict[str, Any]]:
    """Return the attack stage with dask workers beside forks of its own."""
    project = _project(train, count, folder)
    ways = {
        "1 fork": ("runtime.workers=1",),
        "2 forks": ("runtime.workers=2",),
        "1 dask worker": ("--scheduler", "1"),
        "2 dask workers": ("--scheduler", "2"),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in tqdm(range(runs), desc="workers", disable=None):
        for way, options in ways.items():
            shutil.rmtree(project / ".work", ignore_errors=True)
            changes = [option for option in options if "=" in option]
            configure(project / "params.yaml", changes or ["runtime.workers=null"])
            times[way].append(_stage(project, *(option for option in options if "=" not in option)).seconds)
    return [{"way": way, "images": count, "stage": Spread.of(values)._asdict()} for way, values in times.items()]


def _project(train: Prepared, count: int, folder: Path) -> Path:
    """Make a folder in which the attack stage can run on so many images: one view, in shards of 256."""
    project = folder / f"images-{count}"
    if not project.is_dir():
        write_prepared(project / "data/prepared/train.h5", first_images(train, count))
        save_weights(real_teacher(CPU), project / "models/teacher.safetensors")
        (project / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
        changes = ["attack.views=1", "attack.rows_per_shard=256", "views.padding=4", "views.flip=true"]
        configure(project / "params.yaml", changes)
    return project


class Ran(NamedTuple):
    """A command that has ended."""

    seconds: float
    peak: float
    """MiB."""


def _stage(project: Path, *options: str) -> Ran:
    """Return the attack stage, in a process of its own."""
    begin, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.attack", *options],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)  # to look at its memory takes a tenth of a second
    if process.returncode:
        raise click.ClickException(f"the attack in {project} failed")
    return Ran(time.perf_counter() - begin, peak)


def _search_alone(project: Path) -> float:
    """Return seconds that all searches of a project take, side by side as in the stage, when nothing is written."""
    params, train = load_params(project / "params.yaml"), read_prepared(project / "data/prepared/train.h5")
    teacher = loaded_teacher(CPU)
    search = search_of(teacher.model, params.search, search_batch(params.runtime, CPU), CPU)
    dataset = SampleDataset.of(train, params, teacher, Store(project / "none"))

    def only_search(block: Block, slot: int) -> None:
        dataset.values(search, block)

    tasks = [partial(only_search, block) for block in dataset.blocks]
    return seconds_of(partial(list, run_in_forks(tasks, side_by_side(params.runtime, CPU))), CPU)[0]


def _memory(process: int) -> float:
    """Return MiB of a process and its forks, pages that they share counted once."""
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
        "whole columns, MB/s": spread("opened"),
        "of a checked dataset, MB/s": spread("checked"),
        "rows/s in order": spread("in order"),
        "rows/s at random": spread("random"),
    }


def _growth_row(record: dict[str, Any]) -> dict[str, str]:
    def spread(name: str, digits: int) -> str:
        return Spread(**record[name]).text(digits) if name in record else "-"

    return {
        "images": f"{record['images']:,}",
        "attack stage, s": spread("stage", 1),
        "with nothing to do, s": spread("idle", 1),
        "searching alone, s": spread("search", 1),
        "stage over searching": spread("over search", 2),
        "memory at most, MiB": spread("peak_mib", 0),
    }


def _workers_row(record: dict[str, Any]) -> dict[str, str]:
    seconds = Spread(**record["stage"])
    return {
        "by": record["way"],
        "images": f"{record['images']:,}",
        "attack stage, s": seconds.text(1),
    }


def _slope(records: list[dict[str, Any]]) -> str:
    grown = [record for record in records if "work" in record]
    images = np.array([record["images"] for record in grown])
    stage, work = (np.array([record[name]["median"] for record in grown]) for name in ("stage", "work"))
    large = images >= LARGE
    each, start = np.polyfit(images, stage, 1)
    return (
        "Slope of log time against log images, of the stage less a run with nothing to do: "
        f"{np.polyfit(np.log(images), np.log(work), 1)[0]:.3f}; from {LARGE:,} images on "
        f"{np.polyfit(np.log(images[large]), np.log(work[large]), 1)[0]:.3f}. The stage takes about {start:.1f} s, and "
        f"{each * 1000:.2f} s for each 1,000 images."
    )


if __name__ == "__main__":
    main()
