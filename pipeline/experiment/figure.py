"""The figure of an experiment: accuracy along an axis, with standard errors."""

from __future__ import annotations

import itertools
import re
from io import StringIO
from typing import Any

from pipeline.evaluate.statistics import estimate
from pipeline.experiment.results import Results, varied_labels

COLOURS = {"original": "#8c8c8c", "hinton": "#4c72b0", "bss": "#c44e52"}  # the same in all figures; then of the others
OTHERS = ("#55a868", "#dd8452", "#8172b3", "#937860", "#da8bc3", "#64b5cd")
LOG_FROM = 5  # the ratio of the largest to the smallest number on the axis


def experiment_svg(results: Results, axis: str) -> str:
    """Return the accuracy on the test split against the numbers in the labels of an axis, as SVG text.

    A line for each combination of the other labels; bars are standard errors. Labels without a number are horizontal
    lines.
    """
    import matplotlib as mpl  # imported here: slow
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = results.title  # the same picture for the same figures
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float | None, float, float]]] = {}
    others = [name for name in varied_labels(results) if name != axis]
    for cell in results.cells:
        name = ", ".join(cell.labels[each] for each in others)
        known = estimate(cell.values("accuracy"))
        if known is not None:
            lines.setdefault(name, []).append((number_in(cell.labels[axis]), known.mean, known.error or 0.0))
    colours = itertools.cycle(OTHERS)
    for name, points in lines.items():
        colour = COLOURS.get(name) or next(colours)
        numbered = sorted((x, mean, error) for x, mean, error in points if x is not None)
        axes.errorbar(
            [x for x, _, _ in numbered],
            [100 * mean for _, mean, _ in numbered],
            [100 * error for _, _, error in numbered],
            color=colour,
            marker="o",
            capsize=3,
            label=name,
        )
        for x, mean, _ in points:
            if x is None:
                axes.axhline(100 * mean, color=colour, linestyle="--", linewidth=1)
    _finish(axes, axis, results)
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _finish(axes: Any, axis: str, results: Results) -> None:
    labels = {cell.labels[axis] for cell in results.cells}
    numbers = sorted({x: label for label in labels if (x := number_in(label)) is not None}.items())
    if numbers and numbers[0][0] > 0 and numbers[-1][0] / numbers[0][0] >= LOG_FROM:
        axes.set_xscale("log")
    axes.set_xticks([x for x, _ in numbers], [label for _, label in numbers])
    axes.minorticks_off()
    others = [label for label in labels if number_in(label) is None]
    axes.set_xlabel(axis + (f" (dashed: {', '.join(others)})" if others else ""))
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def number_in(label: str) -> float | None:
    """Return the number that a label begins with, as 50 of '50 %'."""
    match = re.match(r"(\d+\.?\d*(?:e-?\d+)?)(?: |$)", label)
    return float(match[1]) if match else None
