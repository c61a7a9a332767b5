"""How long teacher and students take on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.core.files import write_json
from pipeline.core.parameters import load_params
from pipeline.evaluate.latency import BATCH, measure_latency, milliseconds
from pipeline.machine.device import set_up_device
from pipeline.networks.weights import load_weights
from stages.cli import EXIT_CODES, NOTHING_WRITTEN, errors_in_one_line, params_option, path_option


@click.command(epilog=EXIT_CODES)
@params_option
@path_option("--teacher", "models/teacher.safetensors", "Weights of the teacher.")
@path_option("--students", "models/students", "Directory of the students' weights.")
@path_option("--out", "reports/latency.json", "File for the results.")
@errors_in_one_line(interrupted=NOTHING_WRITTEN)
def main(params_path: Path, teacher: Path, students: Path, out: Path) -> None:
    """Measure how long teacher and students take on this machine.

    Writes the median seconds of a forward pass of one image and of 64, with the device and the threads of the CPU. The
    report shows them; DVC knows nothing of them. Nothing else should be running.

    \b
    Example: python -m stages.latency
    """
    params = load_params(params_path)
    device = set_up_device(params.runtime)
    files = {student: students / f"{student}-{params.methods[0]}" / "seed-0.safetensors" for student in params.students}
    models = {name: load_weights(path) for name, path in (files | {params.teacher.network: teacher}).items()}
    measured = measure_latency(models, device)
    write_json(out, measured.model_dump())
    for name, each in measured.networks.items():
        click.echo(f"{name}: one image {milliseconds(each.image)} ms, {BATCH} images {milliseconds(each.batch)} ms")
    click.echo(
        f"wrote {out}: medians, {measured.device}, threads: {measured.threads}; show them: python -m stages.report"
    )


if __name__ == "__main__":
    main()
