"""An experiment: the same students under parameters that vary."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.core.errors import ParameterError
from pipeline.core.files import local_path
from pipeline.core.parameters import MOVED, Count, Line, Params, check_params, in_words, read_yaml
from pipeline.core.text import place_of
from pipeline.experiment.results import Labels

TRAIN_FRACTION, TEACHER = "train_fraction", "teacher"  # keys that are no parameters

VARIED = ("attack", "method", "methods", "search", "seeds", "students", "training")


class Experiment(BaseModel):
    """What varies, and with what each result is compared; read from a YAML file.

    Keys of values are those of params.yaml, as `attack.views`; `train_fraction` is the fraction of the training images
    that students see, with as many more epochs, so that they see as many images; `teacher` is the file of another
    teacher than the experiment's, as the teacher stage writes it.
    """

    model_config = ConfigDict(extra="forbid")

    title: Line
    draws: Count = Field(1, description="of views, target classes, parts of the images: other seeds of the dataset")
    values: dict[str, Any] = Field({}, description="parameters of all runs")
    axes: dict[str, Annotated[dict[str, dict[str, Any]], Field(min_length=1)]] = Field(
        {}, description="parameters of each label of each axis"
    )
    references: dict[str, Labels] = Field({}, description="by title: what is another in the row to compare with")
    floor: Labels | None = Field(None, description="the row whose mean less three deviations no run should fall below")
    costs: bool = Field(False, description="whether the table says what the samples took")
    best_epoch_on_test: bool = Field(
        False, description="whether test is evaluated after every epoch, and the best of them shown, as others print it"
    )
    figure: str | None = Field(None, description="the axis along which accuracy is drawn")


class Variant(NamedTuple):
    """One combination of the axes' labels."""

    labels: Labels
    params: Params
    train_fraction: float
    teacher: Path | None
    """Weights of its own teacher; None for the experiment's."""


def load_experiment(path: Path) -> Experiment:
    """Read an experiment's file.

    Raises:
        ParameterError: it is missing, no YAML, or not an experiment.
    """
    values = read_yaml(path)
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        raise ParameterError(f"{path}: {in_words(error)}") from None


def variants(experiment: Experiment, params: Params) -> Iterator[Variant]:
    """Yield all combinations, with their parameters: `params`, and over them what the experiment and its axes say.

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
    fraction, teacher = values.get(TRAIN_FRACTION, 1.0), values.get(TEACHER)
    for key, value in values.items():
        if key in (TRAIN_FRACTION, TEACHER):
            continue
        if key in MOVED:
            raise ParameterError(f"{source}: {key}: is called {MOVED[key]} now")
        if key.partition(".")[0] not in VARIED or key == "training.precision":
            raise ParameterError(f"{source}: '{key}' does not vary in an experiment, only {', '.join(VARIED)}")
        try:
            section, name = place_of(document, key)
        except KeyError:
            raise ParameterError(f"{source}: unknown parameter '{key}'") from None
        section[name] = value
    if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ParameterError(f"{source}: {TRAIN_FRACTION}: expected more than 0 and at most 1, got {fraction}")
    if teacher is not None and not isinstance(teacher, str):
        raise ParameterError(f"{source}: {TEACHER}: expected the name of a weights file, got {teacher}")
    varied = check_params(document, source)
    training = varied.training.model_copy(update={"epochs": round(varied.training.epochs / fraction)})
    params = varied.model_copy(update={"training": training})
    return Variant(labels, params, float(fraction), local_path(teacher) if teacher is not None else None)


def labels_of(variant: Variant) -> Iterator[Labels]:
    """Yield the labels of each cell of a combination."""
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
