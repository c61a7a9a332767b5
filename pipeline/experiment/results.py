"""An experiment: the same students under parameters that vary, its results, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from pipeline.core.errors import DataError
from pipeline.core.text import markdown_table, one_line
from pipeline.evaluate.statistics import (
    STANDARD_ERRORS,
    Difference,
    difference,
    difference_cell,
    estimate,
    mean_cell,
    number,
)

DEVIATIONS = 3  # below the mean of a cell, from where a run of another one counts as failed
BEST_EPOCH = "test_accuracy_best_epoch"
MEASURES = {
    "validation": ("Validation, %", 100),
    "accuracy": ("Test, %", 100),
    BEST_EPOCH: ("Best epoch on test (as others print), %", 100),
    "agreement": ("Agreement, %", 100),
    "divergence": ("KL", 1),
    "calibration_error": ("ECE", 1),
    "distance": ("Distance", 1),
    "robust_accuracy": ("Robust, %", 100),
    "plane_agreement": ("Planes, %", 100),
    "mag_sim": ("MagSim", 1),
    "ang_sim": ("AngSim", 1),
}
IN_TABLE = ("validation", "accuracy", BEST_EPOCH, "mag_sim", "ang_sim")
IN_DETAIL = ("agreement", "divergence", "calibration_error", "distance", "robust_accuracy", "plane_agreement")
SIMILARITIES = ("mag_sim", "ang_sim")
FEWEST_PAIRS = 30  # for a similarity to be shown
COMPARED = ("validation", "accuracy", "ang_sim")

Labels = dict[str, str]
"""By the names of axes, `student` and `method`."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Run(_Strict):
    """One trained student: fractions, similarities (over the pairs of images that all students have in common)."""

    validation: float | None
    accuracy: float
    test_accuracy_best_epoch: float | None = None
    """Of the epoch that is best on test; None of experiments that do not ask for it."""
    agreement: float
    divergence: float | None = None
    """KL(teacher || student), nats; None of results from before it was measured, and so the next ones."""
    calibration_error: float | None = None
    distance: float | None = None
    robust_accuracy: float | None = None
    plane_agreement: float | None = None
    mag_sim: float | None
    ang_sim: float | None


class Cost(_Strict):
    """What the sample dataset of a draw took."""

    samples: int
    bytes: int
    evaluations: int
    """Gradients for all samples."""
    converged: int
    """Samples on the boundary."""


class Cell(_Strict):
    """All runs of a student by a method under one combination."""

    labels: Labels
    runs: list[list[Run]]
    """By draw, then by seed."""
    cost: Cost | None
    """Of one draw; None for methods that read no samples."""

    def values(self, measure: str) -> list[list[float]]:
        """Return a measure by draw and seed, without runs that do not have it."""
        found = [[getattr(run, measure) for run in draw] for draw in self.runs]
        return [[value for value in draw if value is not None] for draw in found]


class Results(_Strict):
    """What an experiment found."""

    title: str
    dataset: str
    teacher: float | dict[str, float]
    """Accuracy on the test split; by their files, where there are several."""
    images: dict[str, int]
    """Of each split."""
    pairs: int
    """Of perturbations that all students have; where there are several teachers, of the one with the fewest."""
    references: dict[str, Labels]
    floor: Labels | None
    costs: bool
    figure: str | None
    codes: int = 1
    """States of the code that made the runs."""
    processors: list[str] = []
    """Kinds of CPU that made them."""
    cells: Annotated[list[Cell], Field(min_length=1)]


def read_results(path: Path) -> Results:
    """Read what the experiment wrote.

    Raises:
        DataError: it is not there, or not what an experiment writes.
    """
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from None


def reference_of(results: Results, cell: Cell, changes: Labels) -> Cell | None:
    """Return the cell to compare with: with other labels as the reference says, and the same otherwise."""
    wanted = cell.labels | changes
    return None if wanted == cell.labels else _cell_of(results, wanted)


def _cell_of(results: Results, labels: Labels) -> Cell | None:
    return next((cell for cell in results.cells if cell.labels == labels), None)


def varied_labels(results: Results) -> list[str]:
    """Return the names of the labels by which cells differ."""
    return [name for name in results.cells[0].labels if len({cell.labels[name] for cell in results.cells}) > 1]


def results_table(results: Results) -> str:
    """Return the results as Markdown, a row for each cell; differences that exceed two standard errors are bold."""
    names = varied_labels(results)
    known = [name for name in IN_TABLE if any(estimate(cell.values(name)) for cell in results.cells)]
    shown = [name for name in known if name not in SIMILARITIES or results.pairs >= FEWEST_PAIRS]
    compared = [name for name in COMPARED if name in shown]
    titles = [f"{MEASURES[name][0].split(',')[0]}, {title}" for title in results.references for name in compared]
    header = [*(name.capitalize() for name in names), "n", *(MEASURES[name][0] for name in shown), *titles]
    header += ["Lowest run, %", "Runs below the floor"] if results.floor else []
    header += ["Samples", "On the boundary, %", "Gradients a sample", "MB"] if results.costs else []
    rows = []
    for cell in results.cells:
        draws, seeds = len(cell.runs), len(cell.runs[0])
        cells = [cell.labels[name] for name in names]
        cells.append(str(seeds) if draws == 1 else f"{draws} x {seeds}")
        cells += [mean_cell(estimate(cell.values(name)), MEASURES[name][1]) for name in shown]
        for changes in results.references.values():
            other = reference_of(results, cell, changes)
            for name in compared:
                ours, theirs = estimate(cell.values(name)), estimate(other.values(name)) if other else None
                cells.append(_bold(difference(ours, theirs), MEASURES[name][1]))
        if results.floor:
            cells += _lowest(results, cell, shown[0])
        if results.costs:
            cells += _costs(cell.cost)
        rows.append(cells)
    images = ", ".join(f"{name} {count:,}" for name, count in results.images.items())
    if isinstance(results.teacher, float):
        teacher, students = f"teacher {results.teacher:.1%}", "all students have"
    else:
        several = (f"{name} {accuracy:.1%}" for name, accuracy in results.teacher.items())
        teacher, students = f"teachers {', '.join(several)}", "all students of a teacher have, at the fewest"
    note = (
        f"{results.dataset}, images: {images}; {teacher} on test. ± is the standard deviation "
        f"between seeds; differences have standard errors in brackets, and are bold beyond {STANDARD_ERRORS} of them."
    )
    similarities = "of" if results.pairs >= FEWEST_PAIRS else "not shown, for want of"
    note += f" Similarities: {similarities} pairs of perturbations that {students} ({results.pairs})."
    if BEST_EPOCH in shown:
        note += " Best epoch on test: chosen by test itself, as others do; no other figure is."
    if results.processors:
        note += f" Trained on: {', '.join(results.processors)}."
    if results.codes > 1:
        note += f" Runs were made by {results.codes} states of the code."
    detail = _detail(results, names)
    return f"{markdown_table(header, rows, len(names))}\n\n{detail}{note}\n"


def _detail(results: Results, names: Sequence[str]) -> str:
    """Return a second table, of what else was measured; empty where nothing was."""
    shown = [name for name in IN_DETAIL if any(estimate(cell.values(name)) for cell in results.cells)]
    if not set(shown) - {"agreement"}:
        return ""
    header = [*(name.capitalize() for name in names), *(MEASURES[name][0] for name in shown)]
    rows = [
        [
            *(cell.labels[name] for name in names),
            *(mean_cell(estimate(cell.values(name)), MEASURES[name][1]) for name in shown),
        ]
        for cell in results.cells
    ]
    note = (
        "Agreement: with the teacher's classes. KL: of the teacher from the student, nats. ECE: error of calibration. "
        "Distance: median to the student's own boundary, L2 in pixels of [0, 1]. Robust: accuracy under a perturbation "
        "half as long as the teacher's median distance. Planes: agreement on planes through three images."
    )
    return f"{markdown_table(header, rows, len(names))}\n\n{note}\n\n"


def _bold(known: Difference | None, scale: float) -> str:
    """Return the cell of a difference, its figure bold where it is clear."""
    figure, space, error = difference_cell(known, scale).partition(" ")
    return f"**{figure}**{space}{error}" if known is not None and known.is_clear else f"{figure}{space}{error}"


def _lowest(results: Results, cell: Cell, measure: str) -> list[str]:
    """Return the lowest run of a row, and how many runs count as failed."""
    runs = [value for draw in cell.values(measure) for value in draw]
    reference = _cell_of(results, cell.labels | (results.floor or {}))
    known = estimate(reference.values(measure)) if reference else None
    if known is None or known.deviation is None:
        return [number(min(runs), 100), "-"]
    floor = known.mean - DEVIATIONS * known.deviation
    return [number(min(runs), 100), str(sum(value < floor for value in runs))]


def _costs(cost: Cost | None) -> list[str]:
    if cost is None:
        return ["-"] * 4
    gradients = f"{cost.evaluations / cost.samples:.1f}"
    return [f"{cost.samples:,}", number(cost.converged / cost.samples, 100), gradients, f"{cost.bytes / 1e6:.1f}"]
