"""Stage student: train one student by one method, all seeds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import mean

import click

from pipeline.config import load_params
from pipeline.data import Prepared, read_prepared, read_validation
from pipeline.errors import ParameterError
from pipeline.networks import check_network
from pipeline.runtime import make_fabric
from pipeline.shard_reader import BoundaryShards
from pipeline.storage import Store, atomic_directory, copy_file, lock, write_atomically, write_json
from pipeline.student_run import Inputs, StudentRun
from pipeline.training import curve_csv
from stages.cli import PATH, WORK, errors_in_one_line, params_option, path_option, say


@click.command()
@params_option
@click.option("--student", required=True, help="Network to train, as resnet8w2.")
@click.option("--method", required=True, help="Name of an entry of `method` in the parameters.")
@path_option("--shards", "data/bss", "Sample dataset, for methods with source 'shards'.")
@path_option("--prepared", "data/prepared", "Prepared splits; without them, shards still train, without a curve.")
@path_option("--teacher", "models/teacher.safetensors", "Teacher's weights, for methods with source 'online'.")
@click.option("--out", type=PATH, help="Directory for the weights.  [default: models/students/STUDENT-METHOD]")
@click.option("--reports", type=PATH, help="Directory for the curves.  [default: reports/students/STUDENT-METHOD]")
@errors_in_one_line
def main(
    params_path: Path,
    student: str,
    method: str,
    shards: Path,
    prepared: Path,
    teacher: Path,
    out: Path | None,
    reports: Path | None,
) -> None:
    """Train a student by a method, once for each seed.

    Writes seed-N.safetensors, and curves.csv and metrics.json (accuracy on the validation split, fraction). Finished
    seeds are kept in .work/fits: another seed trains only that one.

    Example: python -m stages.student --student resnet8w2 --method bss
    """
    params = load_params(params_path)
    try:
        check_network(student)
    except ValueError as error:
        raise ParameterError(f"--student: {error} (got '{student}')") from None
    if method not in params.method:
        raise ParameterError(f"--method: expected one of {', '.join(params.method)}, got '{method}'")
    name = f"{student}-{method}"
    out, reports = out or Path("models/students") / name, reports or Path("reports/students") / name
    source = params.method[method].source
    inputs = Inputs(
        train=_read(read_prepared, prepared / "train.h5", source != "shards"),
        validation=_read(read_validation, prepared / "validation.h5", source != "shards"),
        shards=BoundaryShards(shards) if source == "shards" else None,
        teacher=teacher if source == "online" else None,
    )
    fabric = make_fabric(params.runtime, params.training.precision)
    run = StudentRun(params, student, method, inputs, fabric, Store(WORK / "fits"))
    with lock(WORK / f"student-{name}.lock", say) if fabric.is_global_zero else nullcontext():
        fabric.barrier()  # all processes look for finished runs when nobody else writes
        fits = run.fit_all()
        if not fabric.is_global_zero:
            return
        with atomic_directory(out, "seed-*.safetensors") as directory:
            for seed, fit in enumerate(fits):
                copy_file(fit.weights, directory / f"seed-{seed}.safetensors")
    write_atomically(reports / "curves.csv", curve_csv([({"seed": n}, fit.curve) for n, fit in enumerate(fits)]))
    last = [fit.curve[-1] for fit in fits]
    metrics = {key: mean(row[key] for row in last) for key in ("loss", "validation_accuracy") if key in last[0]}
    write_json(reports / "metrics.json", metrics)
    reused = sum(fit.reused for fit in fits)
    figures = f", validation accuracy {metrics['validation_accuracy']:.1%}" if "validation_accuracy" in metrics else ""
    click.echo(f"wrote {out}: {len(fits)} seeds ({len(fits) - reused} trained, {reused} reused){figures}")


def _read(read: Callable[[Path], Prepared | None], path: Path, needed: bool) -> Prepared | None:
    return read(path) if needed or path.exists() else None


if __name__ == "__main__":
    main()
