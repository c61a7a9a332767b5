"""Stage prepare: a dataset by name to prepared HDF5 files."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.config import load_params
from pipeline.data import SOURCES, prepare, write_prepared
from pipeline.storage import atomic_directory, lock
from stages.cli import WORK, errors_in_one_line, params_option, path_option, say


@click.command()
@params_option
@path_option("--out", "data/prepared", "Directory for the splits.")
@errors_in_one_line
def main(params_path: Path, out: Path) -> None:
    """Split a dataset into train, validation and test.

    Writes one HDF5 file per split: uint8 images (N, C, H, W), labels, class names, statistics of the training split.

    Example: python -m stages.prepare
    """
    dataset = load_params(params_path).dataset
    images, class_names = SOURCES[dataset.name]()
    splits = prepare(images, class_names, dataset.test_fraction, dataset.validation_fraction, dataset.seed)
    with lock(WORK / "prepare.lock", say), atomic_directory(out) as directory:
        for name, split in splits.items():
            write_prepared(directory / f"{name}.h5", split)
    sizes = ", ".join(f"{name} {len(split.labels)}" for name, split in splits.items())
    click.echo(f"wrote {out}: {dataset.name}, {len(class_names)} classes, images: {sizes}")


if __name__ == "__main__":
    main()
