"""Command shards: check, describe, adopt, merge, sample, export. Nothing but `verify --teacher` needs torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from pipeline.core.errors import ShardError, shown
from pipeline.core.parameters import Card, Params, load_params
from pipeline.core.store import Store, lock
from pipeline.publish.adopt import adopt_shards
from pipeline.publish.card import EMPTY_CARD
from pipeline.publish.merge import merge_datasets
from pipeline.publish.parquet import export_parquet
from pipeline.publish.sample import sample_rows
from pipeline.shards.check import check_shard, find_problems
from pipeline.shards.folder import Folder, folder_at
from pipeline.shards.manifest import Manifest, Totals, read_manifest
from pipeline.shards.quantiles import quantiles_of
from stages.cli import (
    EXIT_CODES,
    EXIT_FAILED,
    NOTHING_WRITTEN,
    PATH,
    WORK,
    errors_in_one_line,
    params_option,
    path_option,
    say,
)

TEACHER = Path("models/teacher.safetensors")
QUANTILES = (0.05, 0.5, 0.95)
FORMATS = {"parquet": export_parquet}


@click.group(epilog=EXIT_CODES)
def main() -> None:
    """Check, describe, adopt, merge, sample and export directories of shards with their manifest."""


def counted(count: int, thing: str) -> str:
    """Return so many things, in words."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def samples_or_rows(totals: Totals) -> str:
    """Return how many samples there are, or rows, where these have logits alone."""
    return counted(totals.samples, "sample") if totals.samples else counted(totals.rows, "row")


def card_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the option for what the new dataset's card states of its images."""
    return click.option(
        "--params",
        "params_path",
        type=PATH,
        help="Parameter file whose `card` states title, licence and source.  [default: nothing is stated]",
    )(function)


def _card_of(params_path: Path | None) -> Card:
    return EMPTY_CARD if params_path is None else load_params(params_path).card


@main.command(short_help="Check every shard against the manifest, or the teacher.", epilog=EXIT_CODES)
@click.argument("directory", metavar="DIRECTORY|URL")
@click.option(
    "--teacher",
    type=PATH,
    is_flag=False,
    flag_value=TEACHER,
    help=f"Ask this teacher again about rows drawn at random, and read nothing else.  [without a path: {TEACHER}]",
)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Rows that --teacher is asked about: a view of an image each.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draw of these rows.")
@path_option("--prepared", "data/prepared", "Prepared splits, for --teacher where images are not embedded.")
@params_option
@errors_in_one_line(interrupted=NOTHING_WRITTEN)
def verify(directory: str, teacher: Path | None, rows: int, seed: int, prepared: Path, params_path: Path) -> None:
    """Check every shard against the manifest: size, sha256, columns, values.

    With --teacher, compare logits, margins and statuses of some rows with what the teacher says of them instead:
    whoever rewrites a sample can rewrite its digest, too. Differences of rounding pass.

    Exits with 0 when all is whole, else with 1 and the names of what is wrong.

    \b
    Example: python -m stages.shards verify data/bss
             python -m stages.shards verify data/bss --teacher
    """
    if teacher is not None:
        _ask_again(directory, teacher, rows, seed, prepared, load_params(params_path))
        return
    folder = folder_at(directory)
    manifest = read_manifest(folder)
    problems = find_problems(folder, manifest)
    _fail_for(problems, directory)
    totals = manifest.totals
    click.echo(
        f"{directory}: whole, {counted(totals.shards, 'shard')}, {samples_or_rows(totals)}, {totals.bytes / 1e6:.1f} MB"
    )


def _fail_for(problems: list[str], directory: str) -> None:
    """Say what is wrong, if anything is, and end the command."""
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        click.echo(f"{directory}: {counted(len(problems), 'problem')}", err=True)
        sys.exit(EXIT_FAILED)


def _ask_again(directory: str, path: Path, rows: int, seed: int, prepared: Path, params: Params) -> None:
    from pipeline.attack.teacher_check import check_teacher, draw_rows, teacher_of  # imported here: torch takes seconds
    from pipeline.images.prepared import read_prepared
    from pipeline.machine.device import set_up_device
    from pipeline.shards.reader import BoundaryShards

    shards = BoundaryShards(directory, verify=False)
    manifest, total = shards.manifest, len(shards)
    teacher, device = teacher_of(path, shards), set_up_device(params.runtime)
    file = prepared / "train.h5"
    train = read_prepared(file) if "image" not in manifest.columns and file.exists() else None
    chosen = draw_rows(total, rows, seed)
    with tqdm(total=len(chosen), desc="asking the teacher", unit="row", disable=None) as bar:
        found = check_teacher(shards, teacher, train, chosen, device, bar.update)
    differences = f"logits differ by {found.logits:.2g} at most"
    if found.samples:
        differences += (
            f", margins by {found.margin:.2g}, {found.kept / found.samples:.2%} of {found.samples:,} statuses hold"
        )
    click.echo(
        f"{directory}: {path} was asked about {found.rows:,} of {total:,} rows, in {found.shards:,} of "
        f"{counted(manifest.totals.shards, 'shard')}: {differences}"
    )
    _fail_for(found.problems, directory)


@main.command(short_help="Describe a dataset.", epilog=EXIT_CODES)
@click.argument("directory", metavar="DIRECTORY|URL")
@errors_in_one_line(interrupted=NOTHING_WRITTEN)
def info(directory: str) -> None:
    """Describe a dataset: counts, statuses, quantiles of margin and distance, bytes.

    \b
    Example: python -m stages.shards info data/bss
    """
    folder = folder_at(directory)
    manifest = read_manifest(folder)
    for name, value in _facts(folder, manifest):
        click.echo(f"{shown(name):<26}{shown(value)}")


def _facts(folder: Folder, manifest: Manifest) -> list[tuple[str, str]]:
    for shard in manifest.shards:
        check_shard(folder, manifest, shard)
    spread, totals = quantiles_of(folder, manifest, QUANTILES), manifest.totals
    if manifest.is_sample:
        rows = [("rows", f"{totals.rows}, drawn from all views")]
    else:
        rows = [("training images", f"{manifest.rows}"), ("views", f"{manifest.views}")]
    facts = [
        ("classes", f"{len(manifest.class_names)}: {', '.join(manifest.class_names[:10])}"),
        ("image shape", " x ".join(map(str, manifest.image_shape))),
        *rows,
        ("targets per view", f"{manifest.targets}"),
        ("samples", f"{totals.samples}"),
        ("shards", f"{totals.shards}"),
        ("bytes", f"{totals.bytes} ({totals.bytes / totals.rows:.0f} per row)"),
    ]
    for name, count in totals.statuses.items() if totals.samples else ():
        facts.append((f"status {name}", f"{count} ({count / totals.samples:.2%})"))
    facts.append(("probability margin", _quantiles(spread and spread.probability_margin)))
    facts.append(("distance (L2, pixels)", _quantiles(spread and spread.distance)))
    made_from = [name for name in ("merged", "sample") if manifest.parameters.get(name) is not None]
    facts += [(name, _short_digests(json.dumps(manifest.parameters[name]))) for name in made_from]
    return [*facts, ("fingerprint", manifest.fingerprint[:16]), ("teacher sha256", manifest.digests.teacher[:16])]


def _quantiles(values: list[float] | None) -> str:
    if values is None:
        return "no samples"
    return ", ".join(f"{q:.0%} {value:.4f}" for q, value in zip(QUANTILES, values, strict=True))


def _short_digests(text: str) -> str:
    """Return text with the starts of digests."""
    return re.sub(r"\b([0-9a-f]{16})[0-9a-f]{48}\b", r"\1", text)


@main.command(short_help="Build on somebody's shards.", epilog=EXIT_CODES)
@click.argument("directory", type=PATH)
@errors_in_one_line
def adopt(directory: Path) -> None:
    """Take the shards of a dataset into the private store, so that the attack stage builds on them.

    Whoever pulled 8 views can then raise attack.views to 16 and compute 8.

    \b
    Example: python -m stages.shards adopt data/bss
    """
    manifest = read_manifest(directory)
    for name in ("merged", "sample"):
        if manifest.parameters.get(name) is not None:
            raise ShardError(
                f"{directory}: was put together ('{name}'): the attack builds on what an attack made alone"
            )
    with lock(WORK / "shards.lock", say):
        new = adopt_shards(directory, manifest, Store(WORK / "shards"))
    click.echo(f"adopted {directory}: {new} shards are new in the store, {manifest.totals.shards - new} were there")


@main.command(short_help="Put the views of several datasets together.", epilog=EXIT_CODES)
@click.argument("directories", type=PATH, nargs=-1, required=True, metavar="DIRECTORY...")
@click.option("--out", type=PATH, required=True, help="Directory for the merged dataset.")
@card_option
@errors_in_one_line(interrupted=NOTHING_WRITTEN)
def merge(directories: tuple[Path, ...], out: Path, params_path: Path | None) -> None:
    """Put the views of two or more datasets into one.

    They must be of the same teacher, data and parameters; attack.seed alone may differ, and should, so that the views
    do. All shards are checked first. Writes shards, with views numbered in the order given, their card (README.md and
    croissant.json), and manifest.json, whose parameters list under `merged` where each view is from. A view that is
    there twice is taken once.

    \b
    Example: python -m stages.shards merge data/bss from-ann --out data/merged
    """
    card = _card_of(params_path)
    with _lock_of(out):
        manifest = merge_datasets(directories, out, card)
    totals = manifest.totals
    click.echo(
        f"wrote {out}: {manifest.views} views of {len(directories)} datasets, {counted(totals.shards, 'shard')}, "
        f"{samples_or_rows(totals)}, {totals.bytes / 1e6:.1f} MB"
    )


@main.command(short_help="Draw rows at random, as a preview.", epilog=EXIT_CODES)
@click.argument("directory", type=PATH)
@click.option("-n", "rows", type=int, default=1000, show_default=True, help="Rows: a view of an image each.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw.")
@click.option("--out", type=PATH, required=True, help="Directory for the preview.")
@card_option
@errors_in_one_line(interrupted=NOTHING_WRITTEN)
def sample(directory: Path, rows: int, seed: int, out: Path, params_path: Path | None) -> None:
    """Draw rows at random, without replacement, as a preview.

    Writes a small dataset of one view, with all columns and `index` as they were: shards, their card (README.md and
    croissant.json), and manifest.json, whose parameters say under `sample` what it was drawn from.

    \b
    Example: python -m stages.shards sample data/bss -n 1000 --out data/preview
    """
    card = _card_of(params_path)
    with _lock_of(out):
        manifest = sample_rows(directory, rows, seed, out, card)
    totals = manifest.totals
    click.echo(
        f"wrote {out}: {rows} rows of {directory}, {counted(totals.shards, 'shard')}, {totals.bytes / 1e6:.1f} MB"
    )


@main.command(short_help="Write a dataset in another format.", epilog=EXIT_CODES)
@click.argument("directory", type=PATH)
@click.option("--to", type=click.Choice([*FORMATS]), default="parquet", show_default=True, help="Format.")
@click.option("--out", type=PATH, required=True, help="Directory for the files.")
@errors_in_one_line(interrupted=NOTHING_WRITTEN)
def export(directory: Path, to: str, out: Path) -> None:
    """Write a dataset in another format.

    parquet: a file VIEW-BLOCK.parquet for each shard, with the same columns, dtypes and values, and `view`; arrays are
    nested lists, whose shapes Hugging Face's `datasets` knows. Beside them, manifest.json as it is. Needs pyarrow:
    pip install '.[parquet]'.

    \b
    Example: python -m stages.shards export data/bss --out data/parquet
    """
    with _lock_of(out):
        manifest = FORMATS[to](directory, out)
    size = sum(path.stat().st_size for path in out.glob("*.parquet"))
    click.echo(
        f"wrote {out}: {counted(manifest.totals.shards, 'file')}, {manifest.totals.rows} rows, {size / 1e6:.1f} MB"
    )


def _lock_of(out: Path) -> AbstractContextManager[None]:
    """Return the lock of a directory, which one process at a time may write; the attack stage is not waited for."""
    name = hashlib.sha256(os.fsencode(out.absolute())).hexdigest()[:16]
    return lock(WORK / f"shards-{name}.lock", say)


if __name__ == "__main__":
    main()
