"""An epoch from shards, with the attack in the loop, and on one batch that is at hand; the cost of several students."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import click
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.attack import Counted, plain_loop
from benchmarks.measuring import (
    BATCH,
    Searches,
    Spread,
    benchmark_params,
    first_images,
    loaded_teacher,
    publish,
    real_train,
    seconds_of,
    table,
)
from pipeline.attack.dataset import SampleDataset
from pipeline.core.parameters import Params
from pipeline.core.status import Status
from pipeline.core.store import Store
from pipeline.machine.device import search_batch, side_by_side
from pipeline.machine.processes import make_fabric
from pipeline.networks.classifier import Classifier, architecture_for, build
from pipeline.search.boundary import Problem, SearchResult, logits_in_batches, margin_of
from pipeline.search.geometry import as_ray, row_sum
from pipeline.search.table import search_of
from pipeline.search.teacher_search import TeacherSearch
from pipeline.shards.reader import BoundaryShards
from pipeline.student.online_source import OnlineSource
from pipeline.student.shard_source import ShardSource
from pipeline.training.batches import Batch, BoundaryBatch, BoundarySamples, FreshSource, Source
from pipeline.training.fit import TrainingRun
from pipeline.training.objective import Moment, Objective

EPOCHS, WITH_BOUNDARY = 80, 60  # of the paper's schedule; in the others the boundary loss is off
PAPER_VIEWS = 8
STUDENTS = (1, 2, 4, 8)


class PlainLoop:
    """The rule of Heo et al. (2019) as their code runs it in the training loop, in the place of our search."""

    half_gradients: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    def __init__(self, teacher: Classifier) -> None:
        self.teacher = teacher

    def __call__(self, problem: Problem) -> SearchResult:
        """Return samples far past the boundary, all of them taken, as in their code."""
        images, base, target = problem.images, problem.base, problem.target
        todo = Searches(self.teacher, images, base, target, problem.logits)
        with torch.enable_grad():
            counted = Counted(self.teacher)
            samples = plain_loop(counted, counted, todo, frozen=False)
        delta, scale = as_ray(samples - images, levels=None)
        logits = logits_in_batches(self.teacher, samples, len(images))
        counts = torch.zeros_like(base, dtype=torch.int32)
        return SearchResult(
            delta=delta,
            delta_scale=scale,
            boundary_logits=logits,
            margin=margin_of(logits, base, target),
            distance=row_sum((samples - images).square()).sqrt(),
            status=torch.full_like(base, Status.CONVERGED, dtype=torch.uint8),
            evaluations=counts,
            forwards=counts,
            target=target,
        )


class OneBatch:
    """The same batch in every step: what a perfect source of data would cost."""

    def __init__(self, source: Source, steps: int) -> None:
        self.batch, self.steps, self.rows = next(iter(source.epoch(0))), steps, steps * BATCH
        if isinstance(self.batch, BoundaryBatch):
            rows = torch.arange(len(self.batch.labels), device=self.batch.labels.device)
            self.batch = replace(self.batch, boundary=_AtHand(self.batch.boundary.samples_of(rows)))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        for _ in range(self.steps):
            yield self.batch


class _AtHand:
    """Samples of all rows of a batch, which are there."""

    def __init__(self, found: BoundarySamples) -> None:
        self.found = found

    def samples_of(self, rows: Tensor) -> BoundarySamples:
        return BoundarySamples(
            samples=self.found.samples[rows],
            teacher_logits=self.found.teacher_logits[rows],
            usable=self.found.usable[rows],
        )


@click.command()
@click.option("--runs", default=5, show_default=True, help="Epochs of each kind, in turn.")
@click.option("--images", default=2048, show_default=True, help="Training images.")
@click.option("--student", default="resnet8", show_default=True, help="Network to train.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to train.")
def main(runs: int, images: int, student: str, device: str) -> None:
    """Train a student by every kind of source, for epochs in which the boundary loss is on.

    Example: python -m benchmarks.students
    """
    params = benchmark_params(device)
    with tempfile.TemporaryDirectory() as folder:
        records = epochs_of_sources(params, student, images, runs, Path(folder))
    text = table([_row(record, records) for record in records if "epoch" in record])
    text += "\n\n" + _totals({record["name"]: record for record in records})
    publish("students", torch.device(device), records, text)


def epochs_of_sources(
    params: Params,
    student: str,
    images: int,
    runs: int,
    folder: Path,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
) -> list[dict[str, Any]]:
    """Measure images per second of a student by every source, a turn each, and the attack's before them."""
    fabric = make_fabric(params.runtime, precision)
    device = fabric.device
    train, teacher = first_images(real_train(images), images), loaded_teacher(device)
    batch = search_batch(params.runtime, device)
    search = search_of(teacher.model, params.search, batch, device)
    dataset = SampleDataset.of(train, params, teacher, Store(folder / "store"))
    workers = side_by_side(params.runtime, device)
    seconds, _ = seconds_of(lambda: list(dataset.make(search, dataset.missing(), workers)), device)
    dataset.publish(folder / "bss")
    shards = BoundaryShards(folder / "bss")

    fresh = FreshSource(train, params.views, 0, BATCH, device)
    plain = TeacherSearch.of(teacher.model, PlainLoop, params.search.tolerance, params.search.levels, batch, device)
    from_shards = partial(ShardSource, shards, 0, BATCH, device)
    steps, on_boundary = images // BATCH, (Status.CONVERGED,)
    sources: dict[str, tuple[str, Source]] = {
        "bss, shards resident": ("bss", from_shards(on_boundary, resident=True)),
        "bss, shards streamed": ("bss", from_shards(on_boundary, resident=False)),
        "bss, one batch at hand": ("bss", OneBatch(from_shards(on_boundary, resident=True), steps)),
        "bss, our search in the loop": ("bss", OnlineSource(fresh, search, on_boundary)),
        "bss, the paper's rule in the loop": ("bss", OnlineSource(fresh, plain, on_boundary)),
        "hinton, shards resident": ("hinton", from_shards((), resident=True)),
        "hinton, teacher in the loop": ("hinton", OnlineSource(fresh, search, on_boundary)),
        "original": ("original", fresh),
    }
    torch.manual_seed(0)
    fits = {}
    for name, (method, _) in sources.items():
        network = build(architecture_for(student, train))
        objective = Objective(network, params.method[method].losses)
        fits[name] = TrainingRun(fabric, network, objective, params.training, folder / "checkpoint.pt")
    start = Moment(first_stage=False, epoch=0, epochs=params.training.epochs)
    times: dict[str, list[float]] = {name: [] for name in sources}
    for run in tqdm(range(runs + 1), unit="epoch of each", disable=None):
        for name, (_, source) in sources.items():
            seconds_each, _ = seconds_of(partial(fits[name].train_epoch, source, 0, start, [0]), device)
            if run:  # the first one warms up
                times[name].append(images / seconds_each)
    attack = {"name": "attack", "views_per_second": images * params.attack.views / seconds}
    return [{"name": name, "epoch": Spread.of(values)._asdict()} for name, values in times.items()] + [attack]


def _row(record: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, str]:
    return {
        "source of batches": record["name"],
        "images/s": Spread(**record["epoch"]).text(),
        "times as long as from resident shards": f"{records[0]['epoch']['median'] / record['epoch']['median']:.2f}",
    }


def _totals(records: dict[str, Any]) -> str:
    """Return seconds for each thousand images, over the paper's schedule, by the medians."""

    def seconds(name: str) -> float:
        return 1000 / float(records[name]["epoch"]["median"])

    without = EPOCHS - WITH_BOUNDARY
    shards = WITH_BOUNDARY * seconds("bss, shards resident") + without * seconds("hinton, shards resident")
    ahead = PAPER_VIEWS * 1000 / records["attack"]["views_per_second"]
    hinton = without * seconds("hinton, teacher in the loop")
    rows = []
    for students in STUDENTS:
        ours = ahead + students * shards
        row = {"students": str(students), "from shards, attack included, s": f"{ours:,.0f}"}
        for name in ("our search in the loop", "the paper's rule in the loop"):
            loop = students * (WITH_BOUNDARY * seconds(f"bss, {name}") + hinton)
            row[f"{name}, s"] = f"{loop:,.0f} ({loop / ours:.1f})"
        rows.append(row)
    return (
        f"Calculated from these medians: seconds for each 1,000 training images, for students over {EPOCHS} epochs of "
        f"which {WITH_BOUNDARY} have the boundary loss, with {PAPER_VIEWS} views made once at "
        f"{records['attack']['views_per_second']:.0f} views/s; in brackets, how many times as long as from shards.\n\n"
        + table(rows)
    )


if __name__ == "__main__":
    main()
