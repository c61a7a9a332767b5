"""Stage attack: boundary-supporting samples and teacher logits to HDF5 shards."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click
from tqdm import tqdm

from pipeline.attack import Search
from pipeline.attack_run import SampleDataset
from pipeline.attack_worker import make_on_workers
from pipeline.cluster import connected
from pipeline.config import load_params
from pipeline.data import read_prepared
from pipeline.runtime import choose_device, search_batch, side_by_side
from pipeline.storage import Store, lock
from pipeline.teacher import checked_accuracy, load_for
from stages.cli import WORK, errors_in_one_line, params_option, path_option, say, scheduler_option

TEACHER_CHECK = 2048  # images on which the teacher is checked first


@click.command()
@params_option
@path_option("--prepared", "data/prepared", "Directory of the prepared splits.")
@path_option("--teacher", "models/teacher.safetensors", "Weights of the teacher.")
@path_option("--out", "data/bss", "Directory for the sample dataset.")
@scheduler_option
@click.option("--prune", is_flag=True, help="Afterwards remove all other shards from the store.")
@errors_in_one_line
def main(params_path: Path, prepared: Path, teacher: Path, out: Path, scheduler: str | None, prune: bool) -> None:
    """Search boundary-supporting samples for every view of every training image.

    Writes HDF5 shards and manifest.json. Finished shards are kept in .work/shards: a run that was stopped goes on
    where it was, and more views compute only what is new.

    Example: python -m stages.attack
    """
    params = load_params(params_path)
    train = read_prepared(prepared / "train.h5")
    model = load_for(teacher, train, "teacher")
    device = choose_device(params.runtime)
    dataset = SampleDataset(train, params.dataset, params.attack, teacher, Store(WORK / "shards"))
    with lock(WORK / "shards.lock", say):
        missing = dataset.missing()
        if missing:
            checked_accuracy(model, train.thinned(TEACHER_CHECK), device)
            batch = search_batch(params.runtime, device)
            with ExitStack() as stack:
                if scheduler is not None:
                    client = stack.enter_context(connected(scheduler, params.runtime, say))
                    made = make_on_workers(client, params, prepared / "train.h5", teacher, dataset, missing, say)
                else:
                    search = Search(model, params.attack, params.dataset, device, batch)
                    made = dataset.make(search, missing, side_by_side(params.runtime, device))
                rows = sum(block.rows for block in missing)
                bar = stack.enter_context(tqdm(total=rows, desc="attack", unit="view", unit_scale=True, disable=None))
                for block in made:
                    bar.update(block.rows)
        manifest = dataset.publish(out)
        if prune:
            say(f"removed {dataset.prune()} other shards from {WORK / 'shards'}")
    totals = manifest.totals
    attacked = totals.samples - totals.statuses["base_misclassified"]
    click.echo(
        f"wrote {out}: {totals.shards} shards ({len(missing)} computed, {totals.shards - len(missing)} reused), "
        f"{totals.samples} samples, {totals.statuses['converged'] / max(attacked, 1):.1%} of {attacked} searches "
        f"converged, {totals.bytes / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
