"""An experiment: the same students under parameters that vary, its results, and what they say."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config import Count, Line, Params, check_params, read_yaml
from pipeline.errors import DataError, ParameterError

TRAIN_FRACTION = "train_fraction"
VARIED = ("attack", "method", "methods", "seeds", "students", "training")
STANDARD_ERRORS = 2  # by which a difference is clear
DEVIATIONS = 3  # below the mean of a cell, from where a run of another one counts as failed
MEASURES = {
    "validation": ("Validation, %", 100),
    "accuracy": ("Test, %", 100),
    "mag_sim": ("MagSim", 1),
    "ang_sim": ("AngSim", 1),
}
SIMILARITIES = ("mag_sim", "ang_sim")
FEWEST_PAIRS = 30  # for a similarity to be shown
COMPARED = ("validation", "accuracy", "ang_sim")

Labels = dict[str, str]
"""By the names of axes, `student` and `method`."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Experiment(_Strict):
    """What varies, and with what each result is compared; read from a YAML file.

    Keys of values are those of params.yaml, as `attack.views`; `train_fraction` is the fraction of the training images
    that students see, with as many more epochs, so that they see as many images.
    """

    title: Line
    draws: Count = Field(1, description="of views, target classes, parts of the images: other seeds of the dataset")
    values: dict[str, Any] = Field({}, description="parameters of all runs")
    axes: dict[str, Annotated[dict[str, dict[str, Any]], Field(min_length=1)]] = Field(
        {}, description="parameters of each label of each axis"
    )
    references: dict[str, Labels] = Field({}, description="by title: what is another in the row to compare with")
    floor: Labels | None = Field(None, description="the row whose mean less three deviations no run should fall below")
    costs: bool = Field(False, description="whether the table says what the samples took")
    figure: str | None = Field(None, description="the axis along which accuracy is drawn")


class Variant(NamedTuple):
    """One combination of the axes' labels."""

    labels: Labels
    params: Params
    train_fraction: float


class Run(_Strict):
    """One trained student: fractions, similarities (over the pairs of images that all students have in common)."""

    validation: float | None
    accuracy: float
    agreement: float
    mag_sim: float | None
    ang_sim: float | None


class Cost(_Strict):
    """What the sample dataset of a draw took."""

    samples: int
    bytes: int
    gradients: int
    """Evaluations for all samples."""
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
        """A measure by draw and seed, without runs that do not have it."""
        found = [[getattr(run, measure) for run in draw] for draw in self.runs]
        return [[value for value in draw if value is not None] for draw in found]


class Results(_Strict):
    """What an experiment found."""

    title: str
    dataset: str
    teacher: float
    """Accuracy on the test split."""
    images: dict[str, int]
    """Of each split."""
    pairs: int
    """Of perturbations that all students have."""
    references: dict[str, Labels]
    floor: Labels | None
    costs: bool
    figure: str | None
    cells: Annotated[list[Cell], Field(min_length=1)]


def load_experiment(path: Path) -> Experiment:
    """Read an experiment's file.

    Raises:
        ParameterError: it is missing, no YAML, or not an experiment.
    """
    values = read_yaml(path)
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ParameterError(f"{path}: {'; '.join(problems)}") from None


def variants(experiment: Experiment, params: Params) -> Iterator[Variant]:
    """All combinations, with their parameters: `params`, and over them what the experiment and its axes say.

    Raises:
        ParameterError: a parameter is unknown or bad, or is none that an experiment can vary.
    """
    names = list(experiment.axes)
    taken = [name for name in names if name in ("student", "method")]
    if taken:
        raise ParameterError(f"{experiment.title}: no axis is called '{taken[0]}': vary `methods` or `students`")
    if experiment.figure and experiment.figure not in names:
        known = ", ".join(names) or "there is none"
        raise ParameterError(f"{experiment.title}: figure: expected an axis ({known}), got '{experiment.figure}'")
    for labels in itertools.product(*experiment.axes.values()):
        chosen = dict(zip(names, labels, strict=True))
        values = dict(experiment.values)
        for name, label in chosen.items():
            values |= experiment.axes[name][label]
        source = " ".join(f"{name} {label}" for name, label in chosen.items()) or experiment.title
        yield _variant(chosen, params, values, source)


def _variant(labels: Labels, params: Params, values: Mapping[str, Any], source: str) -> Variant:
    document = params.model_dump(mode="json")
    fraction = 1.0
    for key, value in values.items():
        if key == TRAIN_FRACTION:
            fraction = value
            continue
        *parents, last = key.split(".")
        if (parents or [last])[0] not in VARIED or key == "training.precision":
            raise ParameterError(f"{source}: '{key}' does not vary in an experiment, only {', '.join(VARIED)}")
        section: Any = document
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                raise ParameterError(f"{source}: unknown parameter '{key}'")
            section = section[parent]
        section[last] = value
    if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ParameterError(f"{source}: {TRAIN_FRACTION}: expected more than 0 and at most 1, got {fraction}")
    varied = check_params(document, source)
    training = varied.training.model_copy(update={"epochs": round(varied.training.epochs / fraction)})
    return Variant(labels, varied.model_copy(update={"training": training}), float(fraction))


def labels_of(variant: Variant) -> Iterator[Labels]:
    """The labels of each cell of a combination."""
    for student in variant.params.students:
        for method in variant.params.methods:
            yield variant.labels | {"student": student, "method": method}


def check_comparisons(experiment: Experiment, cells: Sequence[Labels]) -> None:
    """Refuse a reference or a floor that no row could be compared with.

    Raises:
        ParameterError: it names which.
    """
    wanted = experiment.references | ({"floor": experiment.floor} if experiment.floor else {})
    for title, changes in wanted.items():
        if not any(cell | changes in cells for cell in cells):
            raise ParameterError(f"{experiment.title}: '{title}': no row has {changes}")


def read_results(path: Path) -> Results:
    """Read what the experiment wrote.

    Raises:
        DataError: it is not there, or not what an experiment writes.
    """
    try:
        return Results.model_validate_json(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None


class Estimate(NamedTuple):
    """A mean over draws and seeds."""

    mean: float
    deviation: float | None
    """Between seeds, mean over draws (ddof 1)."""
    error: float | None
    """Standard error of the mean."""
    runs: int


def estimate(values: list[list[float]]) -> Estimate | None:
    """Mean and spread of values by draw and seed; None without any.

    Draws share their seeds: the squared standard error is that of the draws' means plus that of the seeds' means. For
    one draw it is that of the seeds.
    """
    flat = [value for draw in values for value in draw]
    if not flat:
        return None
    deviations = [float(np.std(draw, ddof=1)) for draw in values if len(draw) > 1]
    deviation = fmean(deviations) if deviations else None
    error = None
    if len({len(draw) for draw in values}) == 1 and len(flat) > 1:
        table = np.array(values)
        variances = [table.mean(1 - axis).var(ddof=1) / table.shape[axis] for axis in (0, 1) if table.shape[axis] > 1]
        error = float(sum(variances) ** 0.5)
    return Estimate(fmean(flat), deviation, error, len(flat))


class Difference(NamedTuple):
    """A mean less that of a reference."""

    value: float
    error: float | None
    """Standard error, as of independent runs."""

    @property
    def is_clear(self) -> bool:
        """It exceeds two standard errors."""
        return self.error is not None and abs(self.value) > STANDARD_ERRORS * self.error


def difference(cell: Cell, reference: Cell, measure: str) -> Difference | None:
    """How much more than the reference a cell has of a measure; None where one of them has none."""
    ours, theirs = estimate(cell.values(measure)), estimate(reference.values(measure))
    if ours is None or theirs is None:
        return None
    error = None if ours.error is None or theirs.error is None else float(np.hypot(ours.error, theirs.error))
    return Difference(ours.mean - theirs.mean, error)


def reference_of(results: Results, cell: Cell, changes: Labels) -> Cell | None:
    """The cell to compare with: with other labels as the reference says, and the same otherwise."""
    wanted = cell.labels | changes
    return None if wanted == cell.labels else _cell_of(results, wanted)


def _cell_of(results: Results, labels: Labels) -> Cell | None:
    return next((cell for cell in results.cells if cell.labels == labels), None)


def varied_labels(results: Results) -> list[str]:
    """The names of the labels by which cells differ."""
    return [name for name in results.cells[0].labels if len({cell.labels[name] for cell in results.cells}) > 1]


def markdown_table(results: Results) -> str:
    """The results as Markdown, a row for each cell; differences that exceed two standard errors are bold."""
    names = varied_labels(results)
    known = [name for name in MEASURES if any(estimate(cell.values(name)) for cell in results.cells)]
    shown = [name for name in known if name not in SIMILARITIES or results.pairs >= FEWEST_PAIRS]
    compared = [name for name in COMPARED if name in shown]
    titles = [f"{MEASURES[name][0].split(',')[0]}, {title}" for title in results.references for name in compared]
    header = [*(name.capitalize() for name in names), "n", *(MEASURES[name][0] for name in shown), *titles]
    header += ["Lowest run, %", "Runs below the floor"] if results.floor else []
    header += ["Samples", "On the boundary, %", "Gradients a sample", "MB"] if results.costs else []
    lines = [f"| {' | '.join(header)} |", "|---" * len(names) + "|---:" * (len(header) - len(names)) + "|"]
    for cell in results.cells:
        draws, seeds = len(cell.runs), len(cell.runs[0])
        cells = [cell.labels[name] for name in names]
        cells.append(str(seeds) if draws == 1 else f"{draws} x {seeds}")
        cells += [_mean(estimate(cell.values(name)), MEASURES[name][1]) for name in shown]
        for changes in results.references.values():
            other = reference_of(results, cell, changes)
            for name in compared:
                cells.append(_less(difference(cell, other, name) if other else None, MEASURES[name][1]))
        if results.floor:
            cells += _lowest(results, cell, shown[0])
        if results.costs:
            cells += _costs(cell.cost)
        lines.append(f"| {' | '.join(cells)} |")
    images = ", ".join(f"{name} {count:,}" for name, count in results.images.items())
    note = (
        f"{results.dataset}, images: {images}; teacher {results.teacher:.1%} on test. ± is the standard deviation "
        f"between seeds; differences have standard errors in brackets, and are bold beyond {STANDARD_ERRORS} of them."
    )
    similarities = "of" if results.pairs >= FEWEST_PAIRS else "not shown, for want of"
    note += f" Similarities: {similarities} pairs of perturbations that all students have ({results.pairs})."
    return "\n".join([*lines, "", note]) + "\n"


def _lowest(results: Results, cell: Cell, measure: str) -> list[str]:
    """The lowest run of a row, and how many runs count as failed."""
    runs = [value for draw in cell.values(measure) for value in draw]
    reference = _cell_of(results, cell.labels | (results.floor or {}))
    known = estimate(reference.values(measure)) if reference else None
    if known is None or known.deviation is None:
        return [_number(min(runs), 100), "-"]
    floor = known.mean - DEVIATIONS * known.deviation
    return [_number(min(runs), 100), str(sum(value < floor for value in runs))]


def _costs(cost: Cost | None) -> list[str]:
    if cost is None:
        return ["-"] * 4
    gradients = f"{cost.gradients / cost.samples:.1f}"
    return [f"{cost.samples:,}", _number(cost.converged / cost.samples, 100), gradients, f"{cost.bytes / 1e6:.1f}"]


def _mean(value: Estimate | None, scale: float) -> str:
    if value is None:
        return "-"
    deviation = "" if value.deviation is None else f" ± {_number(value.deviation, scale)}"
    return f"{_number(value.mean, scale)}{deviation}"


def _less(value: Difference | None, scale: float) -> str:
    if value is None:
        return "-"
    number = f"{value.value * scale:+.{1 if scale == 100 else 3}f}"
    error = "" if value.error is None else f" ({_number(value.error, scale)})"
    return f"**{number}**{error}" if value.is_clear else f"{number}{error}"


def _number(value: float, scale: float) -> str:
    return f"{value * scale:.{1 if scale == 100 else 3}f}"
