"""Stage attack: boundary-supporting samples and teacher logits to HDF5 shards."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import click
from tqdm import tqdm

from pipeline.attack.columns import Block
from pipeline.attack.dataset import SampleDataset, make_samples
from pipeline.attack.plan import Plan, plan_attack
from pipeline.attack.worker import make_on_workers
from pipeline.core.errors import ParameterError
from pipeline.core.files import check_replaceable
from pipeline.core.parameters import load_params
from pipeline.core.store import Store, lock
from pipeline.images.prepared import read_prepared
from pipeline.machine.cluster import connected
from pipeline.machine.device import search_batch, set_up_device, side_by_side
from pipeline.networks.loading import examined, load_with_digest
from pipeline.publish.card import CARD_FILES, DATASET_FILES
from pipeline.search.table import search_of
from pipeline.shards.manifest import Totals
from stages.cli import (
    EXIT_CODES,
    WORK,
    done,
    errors_in_one_line,
    params_option,
    path_option,
    say,
    scheduler_option,
    warn,
)

TEACHER_CHECK = 512  # images on which the teacher is checked first


@click.command(epilog=EXIT_CODES)
@params_option
@path_option("--prepared", "data/prepared", "Directory of the prepared splits.")
@path_option("--teacher", "models/teacher.safetensors", "Weights of the teacher.")
@path_option("--out", "data/bss", "Directory for the sample dataset.")
@scheduler_option
@click.option("--prune", is_flag=True, help="Afterwards remove all other shards from the store.")
@click.option("--plan", "only_plan", is_flag=True, help="Only say what is to be made, its size and about how long.")
@errors_in_one_line
def main(
    params_path: Path, prepared: Path, teacher: Path, out: Path, scheduler: str | None, prune: bool, only_plan: bool
) -> None:
    """Search boundary-supporting samples for every view of every training image.

    Writes HDF5 shards, their card (README.md, croissant.json) and manifest.json. With attack.targets 0 nothing is
    searched, and views have the teacher's logits alone. Finished shards are kept in
    .work/shards: a run that was stopped goes on where it was, and more views compute only what is new.

    \b
    Example: python -m stages.attack
    """
    if only_plan and (prune or scheduler is not None):
        raise ParameterError(
            "--plan: makes nothing and counts this machine's workers: leave --prune and --scheduler out"
        )
    begin = time.perf_counter()
    params = load_params(params_path)
    train = read_prepared(prepared / "train.h5")
    loaded = load_with_digest(teacher, train, "teacher")
    device = set_up_device(params.runtime)
    dataset = SampleDataset.of(train, params, loaded, Store(WORK / "shards"))
    check_replaceable(out, *DATASET_FILES, beside=CARD_FILES)
    with lock(WORK / "shards.lock", say), ExitStack() as stack:
        missing = dataset.missing() if scheduler is None else dataset.unsure()  # workers find out about these
        if missing or only_plan:
            warn(examined(loaded.model, train.thinned(TEACHER_CHECK), device).warning)
        if only_plan:
            search = search_of(loaded.model, params.search, search_batch(params.runtime, device), device)
            _say_plan(plan_attack(dataset, search), dataset, out, device.type, side_by_side(params.runtime, device))
            return
        made: Iterable[tuple[Block, bool]] = ()
        if missing and scheduler is not None:
            client = stack.enter_context(connected(scheduler, params.runtime, say))
            made = make_on_workers(client, params, prepared / "train.h5", teacher, dataset, missing, say)
        elif missing:
            made = ((block, True) for block in make_samples(dataset, loaded.model, params, missing))
        computed = _follow(made, missing)
        manifest = dataset.publish(out, params.card)
        if prune:
            say(f"removed {dataset.prune()} other shards from {WORK / 'shards'}")
    totals = manifest.totals
    line = (
        f"wrote {out}: {totals.shards} shards ({computed} computed, {totals.shards - computed} reused), "
        f"{_found(totals)}, {totals.bytes / 1e6:.1f} MB"
    )
    done("attack", line, begin, bool(computed))


def _follow(made: Iterable[tuple[Block, bool]], missing: list[Block]) -> int:
    """Show progress over the rows of shards; returns how many were made."""
    if not missing:
        return 0
    computed, rows = 0, sum(block.rows for block in missing)
    with tqdm(total=rows, desc=f"attack, {len(missing)} shards", unit="view", unit_scale=True, disable=None) as bar:
        for block, new in made:
            bar.update(block.rows)
            computed += new
    return computed


def _found(totals: Totals) -> str:
    if not totals.samples:
        return f"{totals.rows} views with logits alone"
    attacked = totals.samples - totals.statuses["base_misclassified"]
    share = totals.statuses["converged"] / max(attacked, 1)
    return f"{totals.samples} samples, {share:.1%} of {attacked} searches converged"


def _say_plan(plan: Plan, dataset: SampleDataset, out: Path, device: str, workers: int) -> None:
    attack = dataset.attack
    verb = "search" if attack.targets else "make"
    seconds = round(plan.views / plan.rate / workers)
    for name, text in (
        ("shards", f"{plan.missing} to make, {plan.shards - plan.missing} in {WORK / 'shards'}: {plan.shards}"),
        (
            "rows",
            f"{plan.views:,} to {verb} of {len(dataset.train.labels) * attack.views:,}: {attack.views} views of "
            f"{len(dataset.train.labels):,} images; target classes of each: {attack.targets}",
        ),
        (
            "bytes",
            f"{plan.bytes / 1e6:,.1f} MB, which {WORK / 'shards'}, {out} and DVC's cache share on one disk; "
            f"{plan.free / 1e6:,.0f} MB are free",
        ),
        (
            "time",
            f"about {timedelta(seconds=seconds)}, by {workers} workers on {device}, each {plan.rate:,.0f} views/s",
        ),
    ):
        click.echo(f"{name:<8}{text}")


if __name__ == "__main__":
    main()
