"""The picture at the top of README.md: what teacher and students say on a plane, after `presets/spirals.yaml`.

    python -m benchmarks.demonstration          # writes docs/figures/spirals.png

Prints on how much of the square each method's students predict the teacher's class: mean and standard deviation over
seeds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import click
import torch

from pipeline.core.parameters import load_params
from pipeline.core.provenance import ROOT
from pipeline.images.prepared import read_prepared
from pipeline.networks.weights import load_weights
from pipeline.report.decision_map import DOTS_PER_INCH, agreement_on, draw_map, logits_on, png_of
from pipeline.report.scenes import planar_scene
from pipeline.shards.reader import BoundaryShards

STAGES = (
    ("configure", str(ROOT / "presets/spirals.yaml")),
    ("prepare",),
    ("teacher",),
    ("attack",),
    ("student", "--all"),
)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "docs/figures/spirals.png", show_default=True)
def main(out: Path) -> None:
    """Run the demonstration in a folder of its own, and draw it."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shutil.copy(ROOT / "params.yaml", directory)
        for command, *arguments in STAGES:
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            command_line = [sys.executable, "-m", f"stages.{command}", *arguments]
            subprocess.run(command_line, cwd=directory, env=environment, check=True)
        out.write_bytes(_picture(directory))


def _picture(directory: Path) -> bytes:
    from matplotlib.figure import Figure

    params, cpu = load_params(directory / "params.yaml"), torch.device("cpu")
    train, shards = read_prepared(directory / "data/prepared/train.h5"), BoundaryShards(directory / "data/bss")
    teacher = load_weights(directory / "models/teacher.safetensors")
    scene = planar_scene(shards, train, teacher.eval())
    expected: Any = logits_on(teacher, scene.plane, cpu)
    maps = {"teacher": (expected, None)}
    for method in params.methods:
        folder = directory / f"models/students/{params.students[0]}-{method}"
        found = [
            logits_on(load_weights(folder / f"seed-{seed}.safetensors"), scene.plane, cpu)
            for seed in range(params.seeds)
        ]
        same = [100 * agreement_on(logits, expected) for logits in found]
        maps[f"{method}: {fmean(same):.1f} ± {stdev(same):.1f} % as the teacher"] = (found[0], expected)
        click.echo(f"{method}: {fmean(same):.2f} ± {stdev(same):.2f} %, n = {len(same)}")
    figure = Figure(figsize=(3 * len(maps), 3.3), dpi=DOTS_PER_INCH / 2, layout="constrained")
    for axes, (title, (logits, dashed)) in zip(figure.subplots(1, len(maps)), maps.items(), strict=True):
        draw_map(axes, scene, logits, train.class_names, dashed)
        axes.set_title(title, fontsize=10)
    return png_of(figure)


if __name__ == "__main__":
    main()
