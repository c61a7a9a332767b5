"""How many levels a stored direction needs: bytes, distance and reading, by levels and compression."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measuring import Searches, Spread, publish, real_searches, seconds_of, table
from pipeline.core.status import Status
from pipeline.networks.fast import folded, halved
from pipeline.publish.writer import write_shard
from pipeline.search.boundary import Problem, SearchResult
from pipeline.search.newton import NewtonSearch
from pipeline.shards.file import read_columns
from pipeline.shards.format import columns_of

LEVELS = (127, 15, 7, 3)


def search(todo: Searches, levels: int) -> SearchResult:
    """Return what our search finds with directions of so many levels each way."""
    problem = Problem(
        images=todo.images,
        base=todo.base,
        target=todo.target,
        logits=todo.logits,
        reference=todo.teacher,
        fast=halved(folded(todo.teacher)),
        batch_size=128,
        levels=levels,
    )
    return NewtonSearch()(problem)


def stored(directions: NDArray[np.int8], compression: str, runs: int) -> tuple[float, Spread]:
    """Return bytes of a direction in a shard, and how many are read in a second, whole shards at a time."""
    rows = len(directions)
    columns = columns_of(directions.shape[1:], 2, 1, embed_images=False)
    values = {name: np.zeros((rows, *column.shape), column.dtype) for name, column in columns.items()}
    values["delta"] = directions[:, None]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.h5"
        write_shard(path, values, columns, fingerprint="0" * 64, view=0, block=0, compression=compression)
        device = torch.device("cpu")
        times = [seconds_of(lambda: read_columns(path, ["delta"]), device)[0] for _ in range(runs)]
        with h5py.File(path) as file:
            size = file["delta"].id.get_storage_size() / rows
        return size, Spread.of(rows / seconds for seconds in times)


@click.command()
@click.option("--rows", default=1024, show_default=True, help="Searches.")
@click.option("--runs", default=5, show_default=True, help="Of reading.")
def main(rows: int, runs: int) -> None:
    """Measure bytes, distance and reading of directions of fewer levels.

    Example: python -m benchmarks.levels
    """
    torch.set_num_threads(1)
    device = torch.device("cpu")
    todo = real_searches(rows, device)
    found = {levels: search(todo, levels) for levels in LEVELS}
    all_done = torch.stack([each.status == Status.CONVERGED for each in found.values()]).all(0)
    records: list[dict[str, Any]] = []
    for levels, result in found.items():
        directions = result.delta.to(torch.int8).numpy()
        farther = (result.distance / found[LEVELS[0]].distance)[all_done]
        for compression in ("none", "gzip"):
            size, rate = stored(directions, compression, runs)
            records.append(
                {
                    "levels": levels,
                    "compression": compression,
                    "converged": float((result.status == Status.CONVERGED).double().mean()),
                    "farther": float(farther.median()) - 1,
                    "bytes": size,
                    "rate": rate,
                }
            )
    rows_of_table = [
        {
            "levels each way, compression": f"{each['levels']}, {each['compression']}",
            "n": str(rows),
            "converged": f"{each['converged']:.1%}",
            "farther than with 127, median": f"{each['farther']:.1%}",
            "bytes of a sample": f"{each['bytes']:,.0f}",
            "samples/s read": each["rate"].text(),
        }
        for each in records
    ]
    publish("levels", device, [each | {"rate": each["rate"]._asdict()} for each in records], table(rows_of_table))


if __name__ == "__main__":
    main()
