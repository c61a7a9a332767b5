"""Stage teacher: train the network to distil, or import its weights."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import click

from pipeline.core.files import write_atomically, write_json
from pipeline.core.parameters import load_params
from pipeline.core.store import Store, lock
from pipeline.images.prepared import read_prepared, read_validation
from pipeline.machine.device import set_up_device
from pipeline.machine.processes import Processes
from pipeline.networks.loading import checked_accuracy
from pipeline.networks.predict import accuracy
from pipeline.networks.weights import convert_state_dict, load_weights, save_weights
from pipeline.teacher import teacher_architecture, train_teacher
from pipeline.training.fit import curve_csv
from stages.cli import (
    EXIT_CODES,
    NOTHING_WRITTEN,
    PATH,
    WORK,
    done,
    errors_in_one_line,
    params_option,
    path_option,
    say,
)


@click.group(invoke_without_command=True, epilog=EXIT_CODES)
@click.pass_context
@params_option
@path_option("--prepared", "data/prepared", "Directory of the prepared splits.")
@path_option("--out", "models/teacher.safetensors", "Weights of the teacher.")
@path_option("--reports", "reports/teacher", "Directory for metrics and curve.")
@errors_in_one_line
def main(context: click.Context, params_path: Path, prepared: Path, out: Path, reports: Path) -> None:
    """Train the teacher, from scratch or from `teacher.pretrained`; or import and check `teacher.weights`.

    Writes weights (safetensors), metrics.json (accuracy on training and validation split, fractions) and curves.csv.

    \b
    Example: python -m stages.teacher
    """
    if context.invoked_subcommand:
        return
    begin = time.perf_counter()
    params = load_params(params_path)
    train, validation = read_prepared(prepared / "train.h5"), read_validation(prepared / "validation.h5")
    if params.teacher.weights:
        teacher = load_weights(Path(params.teacher.weights), teacher_architecture(params.teacher, train))
        curve: list[dict[str, float]] = []
        origin = f"imported from {params.teacher.weights}"
    else:
        processes = Processes(params.runtime, params.teacher.training.precision)
        with lock(WORK / "teacher.lock", say) if processes.is_first else nullcontext():
            processes.barrier()  # all processes look for a finished run when nobody else writes
            result = train_teacher(params, train, validation, processes, Store(WORK / "fits"))
        if not processes.is_first:
            return
        teacher, curve = load_weights(result.weights), result.curve
        pretrained, epochs = params.teacher.pretrained, params.teacher.training.epochs
        trained = f"fine-tuned from {pretrained}" if pretrained else "trained"
        origin = "finished before" if result.reused else f"{trained} for {epochs} epochs"
    device = set_up_device(params.runtime)
    metrics = {"train_accuracy": checked_accuracy(teacher, train, device)}
    if validation is not None:
        metrics["validation_accuracy"] = accuracy(teacher, validation, device)
    save_weights(teacher, out)
    write_json(reports / "metrics.json", metrics)
    write_atomically(reports / "curves.csv", curve_csv([({}, curve)]))
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in metrics.items())
    done("teacher", f"wrote {out}: {params.teacher.network}, {origin}, {figures}", begin, origin != "finished before")


@main.command(short_help="Turn a pickled state dict into safetensors.", epilog=EXIT_CODES)
@click.argument("weights", type=PATH)
@click.option("--out", type=PATH, help="File to write.  [default: beside WEIGHTS, as .safetensors]")
@errors_in_one_line(interrupted=NOTHING_WRITTEN)
def convert(weights: Path, out: Path | None) -> None:
    """Turn a pickled state dict (.pt, .pth) into safetensors; nothing but tensors is loaded from it.

    \b
    Example: python -m stages.teacher convert resnet26.pt
    """
    out = out or weights.parent / f"{weights.stem or 'weights'}.safetensors"
    count = convert_state_dict(weights, out)
    click.echo(f"wrote {out}: {count} tensors; to import it, set teacher.weights: {out}")


if __name__ == "__main__":
    main()
