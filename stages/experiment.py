"""An experiment: students under parameters that vary, as a table with standard errors. No stage of `dvc repro`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from pipeline.core.errors import ParameterError
from pipeline.core.files import write_atomically
from pipeline.core.parameters import load_params
from pipeline.core.store import lock
from pipeline.experiment.figure import experiment_svg
from pipeline.experiment.plan import plan_experiment
from pipeline.experiment.records import RunRecords
from pipeline.experiment.results import results_table
from pipeline.experiment.run import ExperimentRun, Materials
from pipeline.experiment.spec import load_experiment
from pipeline.images.prepared import read_prepared, read_validation
from pipeline.machine.device import side_by_side
from stages.cli import EXIT_CODES, PATH, WORK, errors_in_one_line, params_option, path_option, say


@click.command(epilog=EXIT_CODES)
@click.argument("experiment", type=PATH)
@params_option
@path_option("--prepared", "data/prepared", "Directory of the prepared splits.")
@path_option("--teacher", "models/teacher.safetensors", "Weights of the teacher.")
@click.option("--out", type=PATH, help="Directory for the results.  [default: reports/experiments/NAME]")
@click.option("--runs", type=PATH, help="Directory of finished runs, a small file each.  [default: OUT/runs]")
@click.option("--any-code", is_flag=True, help="Take finished runs that other code made, too; the table says so.")
@click.option("--plan", "only_plan", is_flag=True, help="Only say how many runs there are to train, and the hours.")
@errors_in_one_line
def main(
    experiment: Path,
    params_path: Path,
    prepared: Path,
    teacher: Path,
    out: Path | None,
    runs: Path | None,
    any_code: bool,
    only_plan: bool,
) -> None:
    """Train students under parameters that vary, and compare them.

    EXPERIMENT is a file as those in experiments/; its parameters are laid over those of --params. Writes results.json
    (every run), table.md (mean and standard deviation over seeds, and differences with their standard errors; bold
    where they exceed two) and, for axes of numbers, figure.svg. Each run is put into a small file as it finishes, and
    runs that are there are not made again: an experiment that was stopped goes on where it was, also on another machine
    to which the files were carried. A run that fails is told, and the others go on.
    With --plan, each student is trained by each method for some seconds, and nothing is kept.

    \b
    Example: python -m stages.experiment experiments/methods.yaml
    """
    params, wanted = load_params(params_path), load_experiment(experiment)
    out = out or Path("reports/experiments") / experiment.stem
    train, validation, test = prepared / "train.h5", prepared / "validation.h5", prepared / "test.h5"
    materials = Materials(
        train=read_prepared(train),
        validation=read_validation(validation),
        test=read_prepared(test),
        teacher=teacher,
        work=WORK,
    )
    if max(params.runtime.devices, int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ParameterError("runtime.devices: an experiment trains each run on one device; set it to 1")
    run = ExperimentRun.of(wanted, params, materials, RunRecords(runs or out / "runs"), any_code, say)
    if only_plan:
        plan, device = plan_experiment(run), run.processes.device
        workers = f"{side_by_side(params.runtime, device)} workers on {device.type}"
        click.echo(
            f"{plan.recorded} runs are in {run.records.folder}, {plan.missing} are to be trained: "
            f"about {plan.hours:,.3f} hours by {workers}, without samples and comparisons"
        )
        return
    with lock(WORK / "experiment.lock", say), lock(WORK / "shards.lock", say):
        results = run.results()
    table = results_table(results)
    write_atomically(out / "results.json", results.model_dump_json(indent=1) + "\n")
    write_atomically(out / "table.md", table)
    if results.figure:
        write_atomically(out / "figure.svg", experiment_svg(results, results.figure))
    count = sum(len(draw) for cell in results.cells for draw in cell.runs)
    click.echo(
        f"{table}\nwrote {out}: results.json, table.md{', figure.svg' if results.figure else ''} ({count} students)"
    )


if __name__ == "__main__":
    main()
