"""The report class by class: accuracies, confusion matrices, and images on which students and teacher disagree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.core.files import read_hdf5
from pipeline.core.text import one_line
from pipeline.evaluate.quality import Disagreements, read_disagreements
from pipeline.evaluate.statistics import estimate, mean_cell
from pipeline.report.decision_map import DOTS_PER_INCH, INK, PAPER, png_of
from pipeline.report.page import Picture, Pictures, Row, Table
from pipeline.report.samples import png_of_picture

MOST_NAMED = 20  # classes of a confusion matrix with names and numbers
LONGEST_NAME = 16  # characters beside a confusion matrix
THUMBNAIL = 128  # pixels of the longer side, at most

Confusions = Mapping[str, NDArray[np.int64]]
"""By name, the teacher first: (runs, classes, classes), images by class and predicted class."""


def read_confusions(path: Path, runs: Mapping[str, Sequence[str]]) -> Confusions:
    """Read the confusion matrices of the evaluation.

    Args:
        path: the file.
        runs: by name, what its runs are called in the file.

    Raises:
        DataError: it is not there or not what the evaluation writes.
    """
    try:
        with read_hdf5(path) as file:
            return {name: np.stack([file[run][()] for run in each]) for name, each in runs.items()}
    except (OSError, KeyError, ValueError) as error:
        raise _unreadable(path, error) from None


def read_disagreed(path: Path) -> Disagreements:
    """Read the disagreements of the evaluation.

    Raises:
        DataError: the file is not there or not what the evaluation writes.
    """
    try:
        return read_disagreements(path)
    except (OSError, TypeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: cannot be read ({one_line(error)}); make it with: python -m stages.evaluate")


def class_table(confusions: Confusions, names: Sequence[str]) -> Table:
    """Return the accuracy of each class: mean and standard deviation over the runs of each network."""
    counts = next(iter(confusions.values()))[0].sum(1)
    rows = []
    for number, (name, count) in enumerate(zip(names, counts, strict=True)):
        shares = [runs[:, number, number] / count if count else [] for runs in confusions.values()]
        rows.append([name, f"{count:,}", *(mean_cell(estimate([list(each)]), 100) for each in shares)])
    note = (
        "Accuracy of each class in per cent, mean ± standard deviation over student seeds, beside the number of its "
        "test images; a class without any has none."
    )
    return Table(header=["Class", "Images", *confusions], rows=rows, note=note)


def confusion_pictures(confusions: Confusions, names: Sequence[str]) -> Pictures:
    """Return a picture of each network's confusion matrix, mean over its runs."""
    few = len(names) <= MOST_NAMED
    note = (
        "Rows are classes, columns what their test images are taken for, in per cent of the row; mean over student "
        "seeds. A row is empty where a class has no test images."
    )
    if not few:
        note += f" The {len(names)} classes are in the order of the table, from 0."
    pictures = [
        Picture(confusion_png(_shares(runs), names if few else None), name) for name, runs in confusions.items()
    ]
    return Pictures(rows=[Row("", pictures)], note=note)


def _shares(runs: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (classes, classes): the mean over runs as shares of rows, 0 in empty rows."""
    mean = runs.mean(0)
    return np.asarray(mean / np.maximum(mean.sum(1, keepdims=True), 1))


def confusion_png(shares: NDArray[np.float64], names: Sequence[str] | None) -> bytes:
    """Return a confusion matrix as PNG.

    Args:
        shares: (classes, classes) of rows, in [0, 1].
        names: of the classes, to draw with numbers in the cells; None: without.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    side = 3.4 if names is None else max(2.2, 0.9 + 0.32 * len(names))
    figure = Figure(figsize=(side, side), dpi=DOTS_PER_INCH, facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot()
    colours = PowerNorm(0.5, 0, 1)  # a few per cent can be seen
    axes.imshow(shares, cmap="Blues", norm=colours, interpolation="nearest")
    axes.tick_params(colors=INK, labelsize=8, length=0 if names else 3)
    if names:
        short = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in names]
        axes.set_xticks(range(len(names)), short, rotation=90, parse_math=False)
        axes.set_yticks(range(len(names)), short, parse_math=False)
        for (row, column), share in np.ndenumerate(shares):
            if share > 0:
                ink = PAPER if colours(share) > 0.6 else INK
                axes.text(column, row, _percent(share), ha="center", va="center", fontsize=7, color=ink)
    return png_of(figure)


def _percent(share: float) -> str:
    return "<1" if share < 0.01 else f"{100 * share:.0f}"


def disagreement_pictures(found: Disagreements, names: Sequence[str], runs: int) -> Pictures:
    """Return a thumbnail of each image on which students and teacher disagree, of so many runs of students."""
    note = (
        "Test images on which the students differ most from their teacher: of those that a student takes for another "
        f"class than the teacher does, the ones of largest KL(teacher || student), mean over all {runs} students. "
        "Titles are the labels."
    )
    rows = list(_disagreement_rows(found, names, runs))
    return Pictures(
        rows=rows, note=note if rows else "None: all students take all test images for what the teacher does."
    )


def _disagreement_rows(found: Disagreements, names: Sequence[str], runs: int) -> Iterator[Row]:
    for place, image in enumerate(found.image):
        label = names[found.label[place]]
        lines = [
            f"teacher: {names[found.teacher[place]]} ({found.confidence[place]:.0%})",
            f"{found.runs[place]} of {runs} students: {names[found.student[place]]}",
            f"KL {found.divergence[place]:.2f} nats",
        ]
        yield Row(label, [Picture(thumbnail(image), label)], lines)


def thumbnail(image: NDArray[np.uint8]) -> bytes:
    """Return an image (C, H, W), 1 or 3 channels, as PNG, shrunk where it is larger than a thumbnail."""
    pixels = image.transpose(1, 2, 0)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return png_of_picture(picture)
