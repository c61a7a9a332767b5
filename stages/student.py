"""Stage student: train one student by one method, all seeds; or all students by all methods."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean

import click
from tqdm import tqdm

from pipeline.core.errors import ParameterError, TrainingError
from pipeline.core.files import atomic_directory, check_replaceable, copy_file, write_atomically, write_json
from pipeline.core.network_names import check_network
from pipeline.core.parameters import Params, load_params
from pipeline.core.store import Store, lock
from pipeline.machine.cluster import connected
from pipeline.machine.device import side_by_side
from pipeline.machine.processes import Processes
from pipeline.networks.loading import try_out
from pipeline.student.inputs import InputPaths
from pipeline.student.plan import plan_student
from pipeline.student.run import StudentRun, sharing_shards
from pipeline.student.worker import GroupRun, fit_on_workers
from pipeline.training.fit import curve_csv
from stages.cli import (
    EXIT_CODES,
    WORK,
    done,
    errors_in_one_line,
    other_data_option,
    params_option,
    path_option,
    say,
    scheduler_option,
)

SEED_FILES = "seed-*.safetensors"  # names in a student's folder


@click.command(epilog=EXIT_CODES)
@params_option
@click.option("--student", help="Network to train, as resnet8w2.")
@click.option("--method", help="Name of an entry of `method` in the parameters.")
@click.option("--plan", "only_plan", is_flag=True, help="Only say what is to be trained, and in about how many hours.")
@click.option("--all", "everything", is_flag=True, help="Train all `students` by all `methods` of the parameters.")
@path_option("--shards", "data/bss", "Sample dataset, for methods with source 'shards'.")
@path_option("--prepared", "data/prepared", "Prepared splits; without them, shards still train, without a curve.")
@path_option(
    "--teacher",
    "models/teacher.safetensors",
    "Teacher, for source 'online' and methods that read features.",
)
@path_option("--out", "models/students", "Directory for the weights, in a folder STUDENT-METHOD.")
@path_option("--reports", "reports/students", "Directory for the curves, in a folder STUDENT-METHOD.")
@other_data_option
@scheduler_option
@errors_in_one_line
def main(
    params_path: Path,
    student: str | None,
    method: str | None,
    only_plan: bool,
    everything: bool,
    shards: Path,
    prepared: Path,
    teacher: Path,
    out: Path,
    reports: Path,
    other_data: bool,
    scheduler: str | None,
) -> None:
    """Train a student by a method, once for each seed.

    Writes seed-N.safetensors, and curves.csv and metrics.json (accuracy on the validation split, fraction). Finished
    seeds are kept in .work/fits: more seeds train only the new ones, and `dvc repro` after --all trains nothing again.
    Small networks on a CPU are trained four seeds at a time as one network; seeds beyond those asked for are kept, too.
    With --all, a student that cannot be trained is told and left out, and the exit code is 1.
    With --plan, each student by each method is trained for some seconds, all of them unless one is named.

    \b
    Example: python -m stages.student --student resnet8w2 --method bss
             python -m stages.student --all --scheduler 4
    """
    params = load_params(params_path)
    if only_plan and (scheduler is not None or params.runtime.devices > 1):
        raise ParameterError(
            "--plan: trains nothing and counts this machine's workers on one device: leave --scheduler out, and set "
            "runtime.devices to 1"
        )
    chosen = _choose(params, student, method, everything or (only_plan and not student and not method))
    paths, store = InputPaths(shards, prepared, teacher, other_data), Store(WORK / "fits")
    inputs = {source: paths.read(source) for source in {params.method[method].source for _, method in chosen}}
    if scheduler is not None and params.runtime.devices > 1:
        raise ParameterError("--scheduler: trains each run on one device, but runtime.devices is more than 1")
    processes = Processes(params.runtime, params.training.precision)
    for student, method in chosen:
        check_replaceable(out / f"{student}-{method}", SEED_FILES)
    runs = sharing_shards(
        [StudentRun.of(params, *each, inputs[params.method[each[1]].source], processes, store) for each in chosen]
    )
    if only_plan:
        _say_plan(chosen, runs)
        return
    failed: dict[str, TrainingError] = {}

    def note(name: str, error: TrainingError) -> None:
        say(f"error: {error}; the other students go on")
        failed[name] = error

    with ExitStack() as stack:
        if processes.is_first:
            for run in runs:
                stack.enter_context(lock(WORK / f"student-{run.name}.lock", say))
        processes.barrier()  # all processes look for finished runs when nobody else writes
        unfinished = [run.unfinished() for run in runs]
        for run in runs:
            if run.start and run.start.anew:
                say(f"{run.name}: the classifier is for other classes and begins anew: {', '.join(run.start.anew)}")
        for architecture in dict.fromkeys(
            run.architecture for run, seeds in zip(runs, unfinished, strict=True) if seeds
        ):
            try_out(architecture)
        if scheduler is not None and any(unfinished):
            tasks = [
                GroupRun(*each, tuple(group), run.key(group[0]))
                for each, run, seeds in zip(chosen, runs, unfinished, strict=True)
                for group in run.groups(seeds)
            ]
            client = stack.enter_context(connected(scheduler, params.runtime, say))
            with tqdm(total=len(tasks), desc="students", unit="run", disable=None) as bar:
                for _ in fit_on_workers(client, params, paths, store, tasks, say, note):
                    bar.update()
        for run, seeds in zip(runs, unfinished, strict=True):
            if run.name in failed:
                continue
            begin = time.perf_counter()
            try:
                figures = _fit_and_publish(run, out / run.name, reports / run.name)
            except TrainingError as error:
                if len(runs) == 1 or processes.several:
                    raise
                note(run.name, error)
                continue
            if processes.is_first:
                reused = params.seeds - len(seeds)
                counts = f"{params.seeds} seeds ({len(seeds)} trained, {reused} reused)"
                done(run.name, f"wrote {out / run.name}: {counts}{figures}", begin, bool(seeds))
    if failed:
        first = next(iter(failed.values()))
        if len(runs) == 1:
            raise first
        raise TrainingError(
            f"{len(failed)} of {len(runs)} students could not be trained: {', '.join(failed)}"
        ) from first


def _say_plan(chosen: Sequence[tuple[str, str]], runs: Sequence[StudentRun]) -> None:
    """Say what each student by each method would cost, a line each as soon as it is measured."""
    widths = [max(map(len, names)) for names in zip(("student", "method"), *chosen, strict=True)]

    def line(student: str, method: str, *figures: str) -> None:
        click.echo(f"{student:<{widths[0]}}  {method:<{widths[1]}}" + "".join(f"{each:>10}" for each in figures))

    line("student", "method", "runs", "images/s", "hours")
    total, hours = 0, 0.0
    for names, run in zip(chosen, runs, strict=True):
        plan = plan_student(run)
        line(*names, str(plan.runs), f"{plan.rate:,.0f}" if plan.rate else "-", f"{plan.hours:,.3f}")
        total, hours = total + plan.runs, hours + plan.hours
    params, device = runs[0].params, runs[0].processes.device
    line("sum", "", str(total), "", f"{hours:,.3f}")
    finished, workers = len(runs) * params.seeds - total, side_by_side(params.runtime, device)
    click.echo(f"{finished} runs are finished; hours by {workers} workers on {device.type}")


def _choose(params: Params, student: str | None, method: str | None, everything: bool) -> list[tuple[str, str]]:
    """Return the students and methods to train."""
    if everything:
        if student or method:
            raise ParameterError("--all: takes `students` and `methods` from the parameters, not --student or --method")
        return [(student, method) for student in params.students for method in params.methods]
    if not student or not method:
        raise ParameterError("--student and --method: both are needed, or --all")
    try:
        check_network(student)
    except ValueError as error:
        raise ParameterError(f"--student: {error} (got '{student}')") from None
    if method not in params.method:
        raise ParameterError(f"--method: expected one of {', '.join(params.method)}, got '{method}'")
    return [(student, method)]


def _fit_and_publish(run: StudentRun, out: Path, reports: Path) -> str:
    """Train what is not finished, write all seeds; returns the figures for the last line."""
    fits = run.fit_all()
    if not run.processes.is_first:
        return ""
    with atomic_directory(out, SEED_FILES) as directory:
        for seed, fit in enumerate(fits):
            copy_file(fit.weights, directory / f"seed-{seed}.safetensors")
    write_atomically(reports / "curves.csv", curve_csv([({"seed": n}, fit.curve) for n, fit in enumerate(fits)]))
    last = [fit.curve[-1] for fit in fits]
    metrics = {key: mean(row[key] for row in last) for key in ("loss", "validation_accuracy") if key in last[0]}
    write_json(reports / "metrics.json", metrics)
    return f", validation accuracy {metrics['validation_accuracy']:.1%}" if "validation_accuracy" in metrics else ""


if __name__ == "__main__":
    main()
