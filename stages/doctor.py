"""Command doctor: is everything there that a run needs, and what to do if not."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pipeline.doctor import dvc_lines, examine
from stages.cli import EXIT_CODES, EXIT_FAILED, NOTHING_WRITTEN, errors_in_one_line, params_option


@click.command(epilog=EXIT_CODES)
@params_option
@click.option("--dvc", "only_dvc", is_flag=True, help="Look only for what hinders `dvc repro`, and say only that.")
@errors_in_one_line(interrupted=NOTHING_WRITTEN)
def main(params_path: Path, only_dvc: bool) -> None:
    """Look whether this machine and folder are fit for a run, and say what to do if not.

    Prints versions, devices, parameters, dataset, free disk (GB), runs under way and what DVC would run. Exits with 1
    if there is a problem.

    \b
    Example: python -m stages.doctor
    """
    problems = 0
    for line in dvc_lines(Path(), params_path) if only_dvc else examine(Path(), params_path):
        if not only_dvc or line.state != "ok":
            click.echo(f"{line.state:<9}{line.topic:<18}{line.text}")
        problems += line.state == "problem"
    if problems or not only_dvc:
        click.echo(f"{problems} problem{'' if problems == 1 else 's'}" if problems else "nothing hinders a run")
    if problems:
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
