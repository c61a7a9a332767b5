"""Command shards: check, describe and adopt sample datasets. Needs no torch."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np

from pipeline.shard_file import read_columns
from pipeline.shard_format import Manifest, check_shard, find_problems, read_manifest
from pipeline.shard_store import adopt as adopt_shards
from pipeline.status import Status
from pipeline.storage import Store, lock
from stages.cli import EXIT_FAILED, PATH, WORK, errors_in_one_line, say

QUANTILES = (0.05, 0.5, 0.95)


@click.group()
def main() -> None:
    """Check, describe and adopt a directory of shards with its manifest."""


@main.command()
@click.argument("directory", type=PATH)
@errors_in_one_line
def verify(directory: Path) -> None:
    """Check every shard against the manifest: size, sha256, columns.

    Exits with 0 when all is whole, else with 1 and the names of what is wrong.

    Example: python -m stages.shards verify data/bss
    """
    manifest = read_manifest(directory)
    problems = find_problems(directory, manifest)
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        click.echo(f"{directory}: {len(problems)} problems", err=True)
        sys.exit(EXIT_FAILED)
    totals = manifest.totals
    click.echo(f"{directory}: whole, {totals.shards} shards, {totals.samples} samples, {totals.bytes / 1e6:.1f} MB")


@main.command()
@click.argument("directory", type=PATH)
@errors_in_one_line
def info(directory: Path) -> None:
    """Describe a dataset: counts, statuses, quantiles of margin and distance, bytes.

    Example: python -m stages.shards info data/bss
    """
    manifest = read_manifest(directory)
    for name, value in _facts(directory, manifest):
        click.echo(f"{name:<26}{value}")


def _facts(directory: Path, manifest: Manifest) -> list[tuple[str, str]]:
    columns = {"status": [], "margin": [], "distance": []}  # type: dict[str, list[np.ndarray]]
    for shard in manifest.shards:
        check_shard(directory, manifest, shard)
        for name, values in read_columns(directory / shard.name, columns).items():
            columns[name].append(values.ravel())
    status, margin, distance = (np.concatenate(values) for values in columns.values())
    converged = status == Status.CONVERGED
    totals = manifest.totals
    facts = [
        ("classes", f"{len(manifest.class_names)}: {', '.join(manifest.class_names[:10])}"),
        ("image shape", " x ".join(map(str, manifest.image_shape))),
        ("training images", f"{manifest.rows}"),
        ("views", f"{manifest.views}"),
        ("targets per view", f"{manifest.targets}"),
        ("samples", f"{totals.samples}"),
        ("shards", f"{totals.shards}"),
        ("bytes", f"{totals.bytes} ({totals.bytes / totals.rows:.0f} per row)"),
    ]
    for name, count in totals.statuses.items():
        facts.append((f"status {name}", f"{count} ({count / totals.samples:.2%})"))
    probability = np.tanh(np.abs(margin[converged]) / 2)
    for name, values in (("probability margin", probability), ("distance (L2, pixels)", distance[converged])):
        text = ", ".join(f"{q:.0%} {np.quantile(values, q):.4f}" for q in QUANTILES) if len(values) else "no samples"
        facts.append((name, text))
    return [*facts, ("fingerprint", manifest.fingerprint[:16]), ("teacher sha256", manifest.digests.teacher[:16])]


@main.command()
@click.argument("directory", type=PATH)
@errors_in_one_line
def adopt(directory: Path) -> None:
    """Take the shards of a dataset into the private store, so that the attack stage builds on them.

    Whoever pulled 8 views can then raise attack.views to 16 and compute 8.

    Example: python -m stages.shards adopt data/bss
    """
    manifest = read_manifest(directory)
    with lock(WORK / "shards.lock", say):
        new = adopt_shards(directory, manifest, Store(WORK / "shards"))
    click.echo(f"adopted {directory}: {new} shards are new in the store, {manifest.totals.shards - new} were there")


if __name__ == "__main__":
    main()
