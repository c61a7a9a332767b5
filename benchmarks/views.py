"""How many views does a precomputed dataset need? Students from 1 to 16 views, against the attack in the loop."""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from pipeline.attack import Search
from pipeline.attack_run import SampleDataset
from pipeline.config import Params, load_params
from pipeline.data import Prepared, read_prepared
from pipeline.models import placed
from pipeline.prediction import accuracy
from pipeline.runtime import Processes, search_batch
from pipeline.shard_reader import BoundaryShards
from pipeline.storage import Store, file_digest, lock, write_atomically, write_json
from pipeline.student_run import Inputs, StudentRun
from pipeline.teacher import load_for
from pipeline.weights import load_weights
from stages.cli import WORK, errors_in_one_line, params_option, path_option, say

VIEWS = (1, 2, 4, 8, 16)
TEACHER = Path("models/teacher.safetensors")
PREPARED = Path("data/prepared")


@click.command()
@params_option
@click.option("--draws", default=3, show_default=True, help="Independent draws of views and target classes.")
@path_option("--out", "benchmarks/results/views.json", "File for the figures.")
@path_option("--figure", "docs/figures/views.svg", "File for the picture.")
@errors_in_one_line
def main(params_path: Path, draws: int, out: Path, figure: Path) -> None:
    """Accuracy on the validation split against the number of views.

    Needs the prepared data and the teacher (dvc repro teacher). Finished runs are kept in .work, as in the stages.

    Example: python -m benchmarks.views
    """
    params = load_params(params_path)
    with lock(WORK / "shards.lock", say):
        records = list(tqdm(_measure(params, draws), total=2 * (1 + draws * len(VIEWS)), desc="views", disable=None))
    write_json(out, records)
    rows = _summary(records)
    _draw(rows, figure)
    click.echo(_table(rows, params))


def _measure(params: Params, draws: int) -> Iterator[dict[str, Any]]:
    """One record for each method, number of views and draw, with the accuracy of every seed."""
    train, validation = read_prepared(PREPARED / "train.h5"), read_prepared(PREPARED / "validation.h5")
    student = params.students[0]
    processes = Processes(params.runtime, params.training.precision)

    def accuracies(method: str, shards: BoundaryShards | None) -> list[float]:
        run = StudentRun(params, student, method, Inputs(train, None, shards, TEACHER), processes, Store(WORK / "fits"))
        models = [placed(load_weights(fit.weights), processes.device) for fit in run.fit_all()]
        return [accuracy(model, validation, processes.device) for model in models]

    for method in ("hinton_online", "bss_online"):
        yield {"method": method, "views": None, "draw": None, "accuracy": accuracies(method, None)}
    for draw in range(draws):
        for views in VIEWS:
            shards = _published(params, train, draw, views, processes.device)
            for method in ("hinton", "bss"):
                yield {"method": method, "views": views, "draw": draw, "accuracy": accuracies(method, shards)}


def _published(params: Params, train: Prepared, draw: int, views: int, device: torch.device) -> BoundaryShards:
    """The first views of a draw; each draw has seeds of its own."""
    attack = params.attack.model_copy(update={"views": views, "seed": params.attack.seed + draw})
    dataset = SampleDataset(train, params.dataset, attack, file_digest(TEACHER), Store(WORK / "shards"))
    missing = dataset.missing()
    if missing:
        teacher = load_for(TEACHER, train, "teacher")
        batch = search_batch(params.runtime, device)
        for _ in dataset.make(Search(teacher, attack, params.dataset, device, batch), missing):
            pass
    directory = WORK / "views" / f"draw-{draw}-views-{views}"
    dataset.publish(directory)
    return BoundaryShards(directory)


def _summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over draws and seeds for each method and number of views, and the spread of each.

    Draws share their seeds; the standard error adds the spread of the draws' means and that of the seeds' means, each
    over its own number.
    """
    rows = []
    for method, views in dict.fromkeys((record["method"], record["views"]) for record in records):
        runs = np.array([r["accuracy"] for r in records if (r["method"], r["views"]) == (method, views)])
        draws, seeds = runs.shape
        between_draws = runs.mean(1).std(ddof=1) if draws > 1 else 0.0
        seed_effect = runs.mean(0).std(ddof=1) if seeds > 1 else 0.0
        rows.append(
            {
                "method": method,
                "views": views,
                "mean": runs.mean(),
                "between_draws": between_draws,
                "between_seeds": runs.std(1, ddof=1).mean() if seeds > 1 else 0.0,
                "standard_error": (between_draws**2 / draws + seed_effect**2 / seeds) ** 0.5,
                "draws": draws,
                "seeds": seeds,
            }
        )
    return rows


def _table(rows: list[dict[str, Any]], params: Params) -> str:
    lines = [
        f"Validation accuracy of {params.students[0]} on {params.dataset.name}, %.",
        "",
        "| Method | Views | Mean | standard error | sd between draws | sd between seeds | draws x seeds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        between = "-" if row["draws"] == 1 else f"{row['between_draws'] * 100:.1f}"
        views = "online" if row["views"] is None else row["views"]
        lines.append(
            f"| {row['method'].removesuffix('_online')} | {views} | {row['mean'] * 100:.1f} "
            f"| {row['standard_error'] * 100:.1f} | {between} "
            f"| {row['between_seeds'] * 100:.1f} | {row['draws']} x {row['seeds']} |"
        )
    return "\n".join(lines)


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against views, with the online runs as horizontal lines."""
    mpl.rcParams["svg.hashsalt"] = "views"  # the same picture for the same figures
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for method, colour, title in (("hinton", "#7f7f7f", "Hinton"), ("bss", "#c44e52", "Hinton + boundary samples")):
        shown = [row for row in rows if row["method"] == method]
        error = [100 * row["standard_error"] for row in shown]
        means = [100 * row["mean"] for row in shown]
        axes.errorbar(
            [row["views"] for row in shown], means, error, color=colour, marker="o", capsize=3, label=f"{title}, shards"
        )
        online = next(row for row in rows if row["method"] == f"{method}_online")
        axes.axhline(100 * online["mean"], color=colour, linestyle="--", linewidth=1, label=f"{title}, in the loop")
    axes.set_xscale("log", base=2)
    axes.set_xticks(VIEWS, [str(value) for value in VIEWS])
    axes.set_xlabel("views per training image")
    axes.set_ylabel("validation accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    write_atomically(path, text.getvalue())


if __name__ == "__main__":
    main()
