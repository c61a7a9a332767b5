"""Stage teacher: train the network to distil, or import its weights."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import click

from pipeline.core.errors import WeightsError
from pipeline.core.extensions import is_own
from pipeline.core.files import write_atomically, write_json
from pipeline.core.parameters import load_params
from pipeline.core.store import Store, lock
from pipeline.core.text import one_line
from pipeline.images.prepared import read_prepared, read_validation
from pipeline.machine.device import set_up_device
from pipeline.machine.processes import Processes
from pipeline.networks.checkpoint import INDEX, convert_checkpoint
from pipeline.networks.loading import examined, try_out
from pipeline.networks.predict import accuracy
from pipeline.networks.pretrained import read_start
from pipeline.networks.weights import load_weights, save_weights
from pipeline.teacher import imported_teacher, teacher_architecture, train_teacher
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
    warn,
)

LEFT_OUT = 5  # things beside the weights that are named


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
        teacher = imported_teacher(params.teacher, train)
        curve: list[dict[str, float]] = []
        origin = f"imported from {params.teacher.weights}"
    else:
        processes = Processes(params.runtime, params.teacher.training.precision)
        try_out(teacher_architecture(params.teacher, train))
        with lock(WORK / "teacher.lock", say) if processes.is_first else nullcontext():
            processes.barrier()  # all processes look for a finished run when nobody else writes
            result = train_teacher(params, train, validation, processes, Store(WORK / "fits"))
        if not processes.is_first:
            return
        teacher, curve = load_weights(result.weights), result.curve
        pretrained, epochs = params.teacher.pretrained, params.teacher.training.epochs
        trained = "trained"
        if pretrained:
            trained = f"fine-tuned from {pretrained}"
            if anew := read_start(pretrained, teacher.architecture).anew:
                say(f"{pretrained}: the classifier is for other classes, and began anew: {', '.join(anew)}")
        origin = "finished before" if result.reused else f"{trained} for {epochs} epochs"
    device = set_up_device(params.runtime)
    found = examined(teacher, train, device, trained_here=not params.teacher.weights)
    metrics = {"train_accuracy": found.accuracy}
    if validation is not None:
        metrics["validation_accuracy"] = accuracy(teacher, validation, device)
    save_weights(teacher, out)
    write_json(reports / "metrics.json", metrics)
    write_atomically(reports / "curves.csv", curve_csv([({}, curve)]))
    warn(found.warning)
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in metrics.items())
    done("teacher", f"wrote {out}: {params.teacher.network}, {origin}, {figures}", begin, origin != "finished before")


@main.command(short_help="Find a network's weights in a checkpoint, and write them as safetensors.", epilog=EXIT_CODES)
@click.argument("weights", type=PATH)
@params_option
@click.option("--network", help="Name of the network, as cifar.resnet32x4.  [default: teacher.network]")
@click.option("--entry", help="Where its weights are, if several in the file fit, as state_dict_ema.")
@click.option(
    "--classes",
    "names",
    type=PATH,
    help="File of the classes' names, one a line, as the outputs are ordered: they get the prepared data's order.",
)
@path_option("--prepared", "data/prepared", "Directory of the prepared splits, for --classes.")
@click.option("--out", type=PATH, help="File to write.  [default: beside WEIGHTS, as .safetensors]")
@errors_in_one_line(interrupted=NOTHING_WRITTEN)
def convert(
    weights: Path,
    params_path: Path,
    network: str | None,
    entry: str | None,
    names: Path | None,
    prepared: Path,
    out: Path | None,
) -> None:
    """Find a network's weights in a checkpoint (.pt, .pth, .ckpt, .safetensors), and write them as safetensors.

    They may be anywhere in it, under any prefix; what is left out is told. Nothing but tensors and plain values is
    loaded. Floats become float32.

    \b
    Example: python -m stages.teacher convert resnet26.pt --network resnet26
    """
    if network is None or is_own(network):  # the parameters say where code of the user's own lies
        params = load_params(params_path)
        network = network or params.teacher.network
    out = out or weights.parent / f"{Path(weights.name.removesuffix(INDEX)).stem or 'weights'}.safetensors"
    order = (_lines(names), read_prepared(prepared / "train.h5").class_names) if names is not None else None
    found = convert_checkpoint(weights, out, network, entry, order)
    where = f" at entry '{found.entry}'" if found.entry else ""
    channels = f", {found.channels} channel{'s' * (found.channels > 1)}" if found.channels else ""
    cast = f", {', '.join(found.cast)} to float32" if found.cast else ""
    more = f" and {len(found.left_out) - LEFT_OUT} more" if len(found.left_out) > LEFT_OUT else ""
    left_out = f"; left out {', '.join(found.left_out[:LEFT_OUT])}{more}" if found.left_out else ""
    click.echo(
        f"wrote {out}: {found.tensors} tensors of {network}{where}, {found.classes} classes{channels}{cast}{left_out}; "
        f"to import it, set teacher.weights: {out} and teacher.network: {network}"
    )


def _lines(path: Path) -> list[str]:
    """Return the lines of a file of names that are not empty."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise WeightsError(f"{path}: no readable file of class names: {one_line(error)}") from None


if __name__ == "__main__":
    main()
