"""Search, shards and training on an accelerator: rates, a check of what was stored, the cost of a large table."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch

from benchmarks.attack import Counted, ours, plain_loop
from benchmarks.measuring import (
    Searches,
    Spread,
    benchmark_params,
    first_images,
    loaded_teacher,
    publish,
    real_searches,
    real_teacher,
    real_train,
    seconds_of,
    table,
)
from benchmarks.students import epochs_of_sources
from pipeline.attack.dataset import SampleDataset
from pipeline.core.status import Status
from pipeline.core.store import Store
from pipeline.machine.device import set_up_device
from pipeline.networks.fast import folded, halved
from pipeline.search.boundary import logits_in_batches, margin_of
from pipeline.search.table import search_of
from pipeline.shards.reader import BoundaryShards, samples_of

SEARCH_BATCHES = (512, 1024, 2048, 4096, 8192)
PLAIN_ROWS = 4096  # searches of the plain loop, which takes batches of 64
PRECISIONS: tuple[Literal["32-true", "bf16-mixed"], ...] = ("32-true", "bf16-mixed")
# The paper's table: students, methods x seeds of each, epochs of the training images of CIFAR-10 with a tenth held out.
TABLE_STUDENTS, TABLE_RUNS, TABLE_EPOCHS, TABLE_IMAGES = ("resnet8", "resnet14", "resnet20"), 6 * 3, 80, 45_000


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True, help="cpu to try it.")
@click.option("--images", default=16_384, show_default=True, help="Searches, rows of shards, images of an epoch.")
@click.option("--runs", default=5, show_default=True, help="Of each measurement, in turn.")
def main(device: str, images: int, runs: int) -> None:
    """Measure everything that is fast on a GPU, in less than ten minutes; writes results where there is one.

    Example: python -m benchmarks.gpu
    """
    begin = time.perf_counter()
    params = benchmark_params(device)
    place = set_up_device(params.runtime)
    records = _searches(images, runs, place)
    with tempfile.TemporaryDirectory() as folder:
        records += _stored(images, place, Path(folder))
        for precision in PRECISIONS if device == "cuda" else PRECISIONS[:1]:
            for student in TABLE_STUDENTS:
                place_each = Path(folder) / precision / student
                for record in epochs_of_sources(params, student, images, runs, place_each, precision):
                    records.append(record | {"precision": precision, "student": student})
    text = (
        f"{_search_table(records)}\n\n{_stored_text(records)}\n\n{_training_table(records)}\n\n{_large_table(records)}"
    )
    text += f"\n\nAll of it: {(time.perf_counter() - begin) / 60:.1f} minutes."
    if device == "cuda":
        publish("gpu", place, records, text)
    else:
        click.echo(text)


def _searches(images: int, runs: int, device: torch.device) -> list[dict[str, Any]]:
    """Return rates of the search by batch size, and of the plain loop."""
    todo = real_searches(images, device)
    half = halved(folded(todo.teacher))
    ways = {
        f"newton, batches of {batch}": (images, partial(ours, gradients=3, batch=batch)) for batch in SEARCH_BATCHES
    }
    ways["plain loop of the paper's rule"] = (min(images, PLAIN_ROWS), partial(plain_loop, frozen=False))
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for run in range(runs + 1):
        for way, (rows, search) in ways.items():
            part = Searches(todo.teacher, *(tensor[:rows] for tensor in todo[1:]))
            seconds, _ = seconds_of(partial(search, Counted(half), Counted(todo.teacher), part), device)
            if run:  # the first one warms up
                rates[way].append(rows / seconds)
    return [{"search": way, "samples_per_second": Spread.of(values)._asdict()} for way, values in rates.items()]


def _stored(images: int, device: torch.device, folder: Path) -> list[dict[str, Any]]:
    """Make shards, and find the margins of their samples again: on the same device one by one, and on a CPU."""
    params = benchmark_params(device.type)
    params = params.model_copy(update={"attack": params.attack.model_copy(update={"views": 1})})
    train, teacher = first_images(real_train(images), images), loaded_teacher(device)
    search = search_of(teacher.model, params.search, 2048, device)
    dataset = SampleDataset.of(train, params, teacher, Store(folder / "stored"))
    seconds, _ = seconds_of(lambda: list(dataset.make(search, dataset.blocks)), device)
    dataset.publish(folder / "bss")
    shards = BoundaryShards(folder / "bss")
    errors: dict[str, list[float]] = {device.type: [], "cpu": []}
    for place in errors:
        judge = real_teacher(torch.device(place))
        for shard in shards.manifest.shards:
            columns = {
                name: torch.from_numpy(values).to(place)
                for name, values in shards.read(
                    shard, ["image", "delta", "delta_scale", "label", "target", "margin", "status"]
                ).items()
            }
            done = columns["status"][:, 0] == Status.CONVERGED
            columns = {name: values[done] for name, values in columns.items()}
            samples = samples_of(columns["image"], columns["delta"][:, 0], columns["delta_scale"][:, 0])
            with torch.no_grad():
                logits = logits_in_batches(judge, samples, 100)
            margin = margin_of(logits, columns["label"], columns["target"][:, 0].long())
            errors[place] += (margin - columns["margin"][:, 0]).abs().tolist()
    checked = {place: {"n": len(values), "largest": float(np.max(values))} for place, values in errors.items()}
    return [{"name": "stored", "rows_per_second": images / seconds, "checked": checked}]


def _search_table(records: list[dict[str, Any]]) -> str:
    rates = {record["search"]: record["samples_per_second"] for record in records if "search" in record}
    plain = list(rates.values())[-1]["median"]
    return table(
        [
            {"search": way, "samples/s": Spread(**rate).text(), "over the plain loop": f"{rate['median'] / plain:.1f}"}
            for way, rate in rates.items()
        ]
    )


def _stored_text(records: list[dict[str, Any]]) -> str:
    (stored,) = (record for record in records if record.get("name") == "stored")
    checked = "; ".join(f"{place} {each['largest']:.1e} of {each['n']:,}" for place, each in stored["checked"].items())
    return (
        f"Shards are made, written to disk included, at {stored['rows_per_second']:,.0f} rows/s. Largest difference "
        f"between a recorded margin and one that is computed again, logits: {checked}."
    )


def _training_table(records: list[dict[str, Any]]) -> str:
    return table(
        [
            {
                "student": record["student"],
                "from": record["name"],
                "precision": record["precision"],
                "images/s": Spread(**record["epoch"]).text(),
            }
            for record in records
            if "epoch" in record
        ]
    )


def _large_table(records: list[dict[str, Any]]) -> str:
    seconds: dict[str, float] = {}
    for record in records:
        if "epoch" in record and record["name"] == "bss, shards resident":
            images = TABLE_RUNS * TABLE_EPOCHS * TABLE_IMAGES
            of_student = images / record["epoch"]["median"]
            seconds[record["precision"]] = seconds.get(record["precision"], 0) + of_student
    costs = ", ".join(f"{each / 60:.0f} minutes in {precision}" for precision, each in seconds.items())
    return (
        f"Calculated: {TABLE_RUNS} runs each of {', '.join(TABLE_STUDENTS)}, {TABLE_EPOCHS} epochs of "
        f"{TABLE_IMAGES:,} images, each network at its own rate with the boundary loss on, one run after the other, "
        f"without their start: {costs}."
    )


if __name__ == "__main__":
    main()
