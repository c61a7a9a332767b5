"""Export: a student, or the teacher, as a file that runs without this project."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from pipeline.core.parameters import load_params
from pipeline.export.program import SUFFIXES, check, export
from pipeline.images.prepared import read_prepared
from pipeline.machine.device import cpu_threads
from pipeline.networks.loading import load_for
from stages.cli import EXIT_CODES, NOTHING_WRITTEN, PATH, errors_in_one_line, params_option, path_option

IMAGES_CHECKED = 256


@click.command(epilog=EXIT_CODES)
@click.argument("weights", type=PATH)
@params_option
@click.option(
    "--to", "kind", type=click.Choice(list(SUFFIXES)), default="onnx", show_default=True, help="Kind of file."
)
@path_option("--prepared", "data/prepared", "Directory of the prepared splits: class names, and images to check with.")
@click.option("--out", type=PATH, help="File to write.  [default: exported/ and the student's name]")
@errors_in_one_line(interrupted=NOTHING_WRITTEN)
def main(weights: Path, params_path: Path, kind: str, prepared: Path, out: Path | None) -> None:
    """Write the network of a weights file as a program: pixels in [0, 1] in, logits out, any number of images.

    The class names, the image shape and the normalisation, which is part of the program, are in its metadata. What was
    written is run on test images and compared with the network: onnx by onnxruntime, pt2 by torch.

    \b
    Example: python -m stages.export models/teacher.safetensors --to onnx
    """
    params = load_params(params_path)
    torch.set_num_threads(cpu_threads(params.runtime))
    test = read_prepared(prepared / "test.h5")
    model = load_for(weights, test, "network")
    student = "" if weights.parent.name in ("", "models") else f"{weights.parent.name}-"
    out = out or Path("exported") / f"{student}{weights.stem}{SUFFIXES[kind]}"
    export(model, list(test.class_names), kind, out)
    images = test.thinned(IMAGES_CHECKED).images[:IMAGES_CHECKED]
    found = check(out, kind, model, images)
    click.echo(
        f"wrote {out}: {model.architecture.network}, {len(test.class_names)} classes, {out.stat().st_size / 1e6:,.2f} "
        f"MB; on {found.images} test images its logits differ by {found.largest_difference:.1g} at most, "
        f"{found.same_class} of {found.images} top classes are the same"
    )


if __name__ == "__main__":
    main()
