"""Presets and single values laid over params.yaml."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.configure import configure
from pipeline.core.parameters import load_params
from stages.cli import EXIT_CODES, NOTHING_WRITTEN, errors_in_one_line, params_option, say


@click.command(epilog=EXIT_CODES)
@click.argument("overlays", metavar="[PRESET.yaml | KEY=VALUE]...", nargs=-1, required=True)
@params_option
@errors_in_one_line(interrupted=NOTHING_WRITTEN)
def main(overlays: tuple[str, ...], params_path: Path) -> None:
    """Lay presets and single values over the parameter file, in order; its comments stay.

    presets/ has datasets (digits, mnist, fashion_mnist, cifar10, cifar100, svhn, imagefolder, spirals) and recipes
    (quick, paper). The result is checked before it is written. presets/digits.yaml brings back all defaults but those
    of `runtime`.

    \b
    Example: python -m stages.configure presets/cifar10.yaml presets/paper.yaml
             python -m stages.configure attack.views=16
    """
    changes = configure(params_path, list(overlays))
    for change in changes:
        click.echo(change)
    changed = {change.split(":")[0].split(".")[0] for change in changes if change.startswith(("dataset.name", "card"))}
    if changed == {"dataset"} and any(load_params(params_path).card.model_dump().values()):
        say("note: `card` still describes the dataset before: set card.title, card.source, ... or lay its preset over")
    click.echo(f"wrote {params_path}: {len(changes)} changed" if changes else f"{params_path}: nothing to change")


if __name__ == "__main__":
    main()
