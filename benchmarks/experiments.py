"""Bring what the experiments found into the documentation: tables, figures, and every run as JSON."""

from __future__ import annotations

import re
from pathlib import Path

import click
import torch

from benchmarks.measuring import machine
from pipeline.core.files import write_atomically
from pipeline.core.provenance import ROOT
from pipeline.experiment.results import read_results, results_table
from stages.cli import errors_in_one_line, path_option

DOCUMENT, RESULTS, FIGURES = ROOT / "docs/RESULTS.md", ROOT / "docs/results", ROOT / "docs/figures"
PLACE = re.compile(r"<!-- experiment ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


@click.command()
@path_option("--reports", "reports/experiments", "Directory of the experiments' results, a folder each.")
@errors_in_one_line
def main(reports: Path) -> None:
    """Copy the results of experiments to docs/results, figures to docs/figures, and tables to docs/RESULTS.md.

    A table goes where the page says <!-- experiment NAME -->; experiments without results stay as they are.

    Example: make experiments && python -m benchmarks.experiments
    """

    def block(place: re.Match[str]) -> str:
        name, folder = place[1], reports / place[1]
        if not folder.is_dir():
            return place[0]
        for file, to in (("results.json", RESULTS / f"{name}.json"), ("figure.svg", FIGURES / f"{name}.svg")):
            if (folder / file).exists():
                write_atomically(to, (folder / file).read_text(encoding="utf-8"))
        click.echo(f"{DOCUMENT.name}: {name}")
        table = results_table(read_results(folder / "results.json"))
        return f"<!-- experiment {name} -->\n{table}\n{machine(torch.device('cpu'))}.\n<!-- end -->"

    write_atomically(DOCUMENT, PLACE.sub(block, DOCUMENT.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
