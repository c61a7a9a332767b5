"""As many rows as ImageNet has images, by workers that are killed, and a client that is: time, memory, what is lost."""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader

from benchmarks.measuring import publish, table
from pipeline.configure import configure
from pipeline.core.provenance import ROOT
from pipeline.images.pixels import pixels
from pipeline.images.prepared import Prepared, content_digest, write_prepared
from pipeline.networks.classifier import Architecture, build
from pipeline.networks.fast import frozen
from pipeline.networks.weights import save_weights
from pipeline.search.boundary import logits_in_batches
from pipeline.shards.format import MANIFEST
from pipeline.shards.reader import BoundaryShards
from pipeline.shards.stream import StreamedShards

CPU = torch.device("cpu")
IMAGENET = 1_281_167  # training images
CLASSES, SHAPE = 10, (1, 8, 8)
ROWS_PER_SHARD = 1024
CHANGES = ["attack.views=1", f"attack.rows_per_shard={ROWS_PER_SHARD}", "views.padding=0"]
KILLED_AT = (0.3, 0.6)  # shards that are there, as a share of all, when a worker is killed, and when the client is
WORKERS = 2
SECONDS = 0.2  # between two looks at a process


@click.command()
@click.option("--rows", default=IMAGENET, show_default=True, help="Images of 8x8 pixels, one view each.")
def main(rows: int) -> None:
    """Make, publish, verify and stream a large sample dataset of small images by a cheap search.

    Example: python -m benchmarks.scale
    """
    (ROOT / ".work").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / ".work") as folder:
        records = [measured(count, Path(folder) / str(count)) for count in dict.fromkeys((min(rows, 100_000), rows))]
    publish("scale", CPU, records, table([_row(record) for record in records]))


def measured(rows: int, project: Path) -> dict[str, Any]:
    """Return what a dataset of so many rows costs, made in a new folder."""
    make_project(rows, project)
    shards = math.ceil(rows / ROWS_PER_SHARD)
    stopped = Client(project)
    stopped.wait_for(KILLED_AT[0] * shards)
    stopped.worker().kill()
    stopped.wait_for(KILLED_AT[1] * shards)
    stopped.kill()
    before, there = time.perf_counter() - stopped.begin, len(stored(project))
    client = Client(project)
    rest, said = client.finish()
    again, _ = Client(project).finish()
    begin = time.perf_counter()
    _output(_stage(project, "shards", "verify", "data/bss"))
    verified = time.perf_counter() - begin
    begin = time.perf_counter()
    totals = BoundaryShards(project / "data/bss", verify=False).manifest.totals
    opened = time.perf_counter() - begin
    epoch, images = streamed(project / "data/bss")
    if images != rows:
        raise click.ClickException(f"an epoch of the stream has {images} of {rows} images")
    found = re.search(r"\((\d+) computed", said)
    return {
        "rows": rows,
        "shards": totals.shards,
        "megabytes": totals.bytes / 1e6,
        "manifest_kb": (project / "data/bss" / MANIFEST).stat().st_size / 1e3,
        "seconds": before + rest,
        "lost": int(found[1]) + there - totals.shards if found else None,
        "client_mib": max(stopped.peak, client.peak),
        "idle": again,
        "verify": verified,
        "open": opened,
        "rows_a_second": rows / epoch,
    }


def make_project(rows: int, project: Path) -> None:
    """Make a folder in which the attack stage can run: random images, whose labels are what its teacher says."""
    architecture = Architecture("mlp1w16", CLASSES, SHAPE, (0.5,), (0.25,))
    torch.manual_seed(0)
    teacher = build(architecture)
    images = np.random.default_rng(0).integers(0, 256, (rows, *SHAPE), np.uint8)
    logits = logits_in_batches(frozen(teacher, CPU), pixels(torch.from_numpy(images)), 4096)
    labels = logits.argmax(1).numpy()
    names = tuple(f"class {number}" for number in range(CLASSES))
    train = Prepared(
        images=images,
        labels=labels,
        class_names=names,
        mean=architecture.mean,
        std=architecture.std,
        digest=content_digest([images], images.shape[1:], labels, names),
    )
    write_prepared(project / "data/prepared/train.h5", train)
    save_weights(teacher, project / "models/teacher.safetensors")
    (project / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    configure(project / "params.yaml", CHANGES)


class Client:
    """The attack stage with workers, in processes of their own."""

    def __init__(self, project: Path) -> None:
        self.project, self.peak, self.begin = project, 0.0, time.perf_counter()
        self.process = _stage(project, "attack", "--scheduler", str(WORKERS))

    def wait_for(self, shards: float) -> None:
        """Wait until so many shards are in the store."""
        while len(stored(self.project)) < shards:
            if self.process.poll() is not None:
                raise click.ClickException(f"the attack in {self.project} ended too early")
            self._look()

    def worker(self) -> psutil.Process:
        """Return one of its workers."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(each for each in children if "spawn_main" in " ".join(each.cmdline()))

    def kill(self) -> None:
        """Kill it as the kernel does for want of memory; its workers end with it."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.communicate()
        psutil.wait_procs(children, timeout=60)

    def finish(self) -> tuple[float, str]:
        """Return how long it took, and what it said at its end."""
        while self.process.poll() is None:
            self._look()
        return time.perf_counter() - self.begin, _output(self.process)

    def _look(self) -> None:
        with contextlib.suppress(psutil.Error):
            self.peak = max(self.peak, psutil.Process(self.process.pid).memory_info().rss / 2**20)
        time.sleep(SECONDS)


def stored(project: Path) -> list[Path]:
    """Return the finished shards in a project's store."""
    return list((project / ".work/shards").rglob("*.h5"))


def streamed(directory: Path) -> tuple[float, int]:
    """Return how long one epoch of a stream takes, and how many different images it has."""
    begin, seen = time.perf_counter(), list[torch.Tensor]()
    for batch in DataLoader(StreamedShards(directory), batch_size=1024, num_workers=WORKERS):
        seen.append(batch["index"].clone())  # not the whole batch, which lies in memory that processes share
    index = torch.cat(seen)
    if len(index.unique()) != len(index):
        raise click.ClickException("an epoch of the stream has images twice")
    return time.perf_counter() - begin, len(index)


def _stage(project: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"stages.{arguments[0]}", *arguments[1:]],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _output(process: subprocess.Popen[str]) -> str:
    stdout, stderr = process.communicate()
    if process.returncode:
        raise click.ClickException(f"{process.args!r}: {stderr.strip()}")
    return stdout


def _row(record: dict[str, Any]) -> dict[str, str]:
    return {
        "rows": f"{record['rows']:,}",
        "shards": f"{record['shards']:,}",
        "MB": f"{record['megabytes']:,.0f}",
        "manifest, kB": f"{record['manifest_kb']:,.0f}",
        "made in, s": f"{record['seconds']:,.0f}",
        "shards lost": str(record["lost"]),
        "client at most, MiB": f"{record['client_mib']:,.0f}",
        "with nothing to do, s": f"{record['idle']:,.1f}",
        "verify, s": f"{record['verify']:,.1f}",
        "open, s": f"{record['open']:.2f}",
        "rows/s streamed": f"{record['rows_a_second']:,.0f}",
    }


if __name__ == "__main__":
    main()
