"""Stage prepare: a dataset by name to prepared HDF5 files."""

from __future__ import annotations

import time
from pathlib import Path

import click

from pipeline.core.errors import shown
from pipeline.core.files import atomic_directory
from pipeline.core.parameters import load_params
from pipeline.core.store import lock
from pipeline.images.prepared import SPLITS
from pipeline.prepare.datasets import open_dataset
from pipeline.prepare.decode import Written, prepare
from stages.cli import EXIT_CODES, NOTHING_WRITTEN, WORK, done, errors_in_one_line, params_option, path_option, say

BAD_IMAGES_NAMED = 5
CLASSES_NAMED = 10


@click.command(epilog=EXIT_CODES)
@params_option
@path_option("--out", "data/prepared", "Directory for the splits.")
@click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be read, as with dataset.skip_bad.")
@errors_in_one_line(interrupted=NOTHING_WRITTEN)
def main(params_path: Path, out: Path, skip_bad: bool) -> None:
    """Decode a dataset and split it into train, validation and test.

    Writes one HDF5 file per split: uint8 images (N, C, H, W), labels, class names, statistics of the training split.

    \b
    Example: python -m stages.prepare
    """
    begin = time.perf_counter()
    params = load_params(params_path)
    dataset = params.dataset.model_copy(update={"skip_bad": params.dataset.skip_bad or skip_bad})
    with (
        lock(WORK / "prepare.lock", say),
        atomic_directory(out, *(f"{split}.h5" for split in SPLITS)) as directory,
        open_dataset(dataset, directory) as source,
    ):
        written = prepare(source, dataset, directory, params.runtime.threads)
    for note in (*source.notes, *written.notes):
        say(note)
    for problem in written.bad[:BAD_IMAGES_NAMED]:
        say(f"skipped: {problem}")
    for warning in written.warnings:
        say(f"warning: {warning}")
    click.echo(f"classes, with their images in all splits: {_classes(written)}")
    channels, height, width = written.image_shape
    sizes = ", ".join(f"{name} {count:,}" for name, count in written.counts.items())
    skipped = f", {len(written.bad)} bad ones skipped" if written.bad else ""
    line = (
        f"wrote {out}: {dataset.name}, {len(written.class_names)} classes, {height}x{width}, "
        f"{'gray' if channels == 1 else 'RGB'}, images: {sizes}{skipped}"
    )
    done("prepare", line, begin)


def _classes(written: Written) -> str:
    """Return the names of the first classes with their counts, and how many others there are."""
    counts = written.class_counts
    first = ", ".join(
        f"{shown(name)} ({count:,})" for name, count in zip(written.class_names, counts[:CLASSES_NAMED], strict=False)
    )
    others = counts[CLASSES_NAMED:]
    return f"{first} and {len(others):,} more ({min(others):,} to {max(others):,} each)" if others else first


if __name__ == "__main__":
    main()
