"""From the records of all students to the summary, its table and its plot data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeVar

from pydantic import BaseModel

from pipeline.errors import DataError


class Record(BaseModel):
    """The figures of one run, as the evaluation writes them: fractions, nats, similarities (None without pairs)."""

    seed: int
    accuracy: float
    agreement: float
    teacher_divergence: float
    mag_sim: float | None
    ang_sim: float | None
    mag_sim_common: float | None
    ang_sim_common: float | None


class StudentRecords(BaseModel):
    """The runs of one student by one method."""

    seeds: list[Record]


class TeacherRecord(BaseModel):
    """The teacher's figures."""

    accuracy: float


Result = TypeVar("Result", bound=BaseModel)
Students = Mapping[tuple[str, str], StudentRecords]
"""Records by (student, method)."""

MEASURES = ("accuracy", "agreement", "teacher_divergence", "mag_sim", "ang_sim", "mag_sim_common", "ang_sim_common")
TABLE = {
    "accuracy": ("Accuracy, %", 100),
    "agreement": ("Agreement with teacher, %", 100),
    "mag_sim_common": ("MagSim", 1),
    "ang_sim_common": ("AngSim", 1),
}


def read_result(path: Path, kind: type[Result]) -> Result:
    """Read a result of the evaluation.

    Raises:
        DataError: it is not there or not what the evaluation writes.
    """
    try:
        return kind.model_validate_json(path.read_text())
    except (OSError, ValueError) as error:  # pydantic's errors are ValueErrors
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read ({reason}); make it with: python -m stages.evaluate") from None


def spread(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Mean, standard deviation over seeds (ddof 1; None for one value) and number of the values that are defined."""
    defined = [value for value in values if value is not None]
    return {
        "mean": fmean(defined) if defined else None,
        "std": stdev(defined) if len(defined) > 1 else None,
        "n": len(defined),
    }


def summarise(dataset: str, teacher: TeacherRecord, students: Students) -> dict[str, Any]:
    """The summary of a comparison, as fractions."""
    summary: dict[str, Any] = {"dataset": dataset, "teacher": teacher.model_dump(), "students": {}}
    for (student, method), records in students.items():
        figures = {measure: spread([getattr(record, measure) for record in records.seeds]) for measure in MEASURES}
        summary["students"].setdefault(student, {})[method] = figures
    return summary


def markdown_table(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown: a row for each student and method, mean +- standard deviation over seeds."""
    header = ["Student", "Method", "n", *(title for title, _ in TABLE.values())]
    lines = [f"| {' | '.join(header)} |", "|---|---|" + "---:|" * (len(header) - 2)]
    for student, methods in summary["students"].items():
        for method, figures in methods.items():
            cells = [_cell(figures[measure], scale) for measure, (_, scale) in TABLE.items()]
            lines.append(f"| {student} | {method} | {figures['accuracy']['n']} | {' | '.join(cells)} |")
    teacher = f"Teacher on {summary['dataset']}: {summary['teacher']['accuracy']:.1%} accuracy."
    note = (
        "Mean and standard deviation over student seeds, given one teacher and one draw of views; test split. MagSim "
        "and AngSim over the pairs that all students have in common."
    )
    return f"{teacher}\n\n" + "\n".join(lines) + f"\n\n{note}\n"


def _cell(figure: Mapping[str, float | None], scale: float) -> str:
    if figure["mean"] is None:
        return "no pairs"
    digits = 1 if scale == 100 else 3
    deviation = "" if figure["std"] is None else f" ± {figure['std'] * scale:.{digits}f}"
    return f"{figure['mean'] * scale:.{digits}f}{deviation}"


def accuracy_csv(students: Students) -> str:
    """Accuracy of every run as CSV: student, method, seed, accuracy (fraction)."""
    lines = ["student,method,seed,accuracy"]
    for (student, method), records in students.items():
        lines += [f"{student},{method},{record.seed},{record.accuracy:.6f}" for record in records.seeds]
    return "\n".join(lines) + "\n"
