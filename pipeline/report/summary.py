"""From the records of all students to the summary, its table, its plot data, and the sentence that it comes to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from pipeline.core.errors import DataError
from pipeline.core.parameters import Method
from pipeline.core.text import csv_text, markdown_table, one_line
from pipeline.evaluate.costs import Costs
from pipeline.evaluate.latency import BATCH, Latency, milliseconds
from pipeline.evaluate.statistics import Difference, Estimate, difference, difference_cell, estimate, mean_cell, number


class Record(BaseModel):
    """The figures of one run, as the evaluation writes them: fractions, nats, similarities (None without pairs)."""

    seed: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    agreement: float
    teacher_divergence: float
    mag_sim: float | None
    ang_sim: float | None
    mag_sim_common: float | None
    ang_sim_common: float | None
    pairs_common: int


class StudentRecords(BaseModel):
    """The runs of one student by one method, and what it costs."""

    costs: Costs
    seeds: list[Record]


class TeacherRecord(BaseModel):
    """The teacher's figures, and what it costs."""

    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    costs: Costs


Result = TypeVar("Result", bound=BaseModel)
Students = Mapping[tuple[str, str], StudentRecords]
"""Records by (student, method)."""
Curves = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
"""By (student, method), rows of seed, epoch and validation_accuracy; none without a validation split."""

QUALITY = {"accuracy": "Accuracy, %", "balanced_accuracy": "Balanced accuracy, %", "macro_f1": "Macro F1, %"}
MEASURES = (
    *QUALITY,
    "agreement",
    "teacher_divergence",
    "mag_sim",
    "ang_sim",
    "mag_sim_common",
    "ang_sim_common",
)
METRICS = {name: name for name in QUALITY} | {"MagSim": "mag_sim_common", "AngSim": "ang_sim_common"}
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
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # pydantic's errors are ValueErrors
        reason = one_line(error)
        raise DataError(f"{path}: cannot be read ({reason}); make it with: python -m stages.evaluate") from None


def estimate_of(records: StudentRecords, measure: str) -> Estimate | None:
    """Return the mean over seeds of a measure, without runs that do not have it; None where none has."""
    values = [getattr(record, measure) for record in records.seeds]
    return estimate([[value for value in values if value is not None]])


def _figures(known: Estimate | None) -> dict[str, float | int | None]:
    """Return mean, standard deviation over seeds (ddof 1; None for one run) and number of runs."""
    if known is None:
        return {"mean": None, "std": None, "n": 0}
    return {"mean": known.mean, "std": known.deviation, "n": known.runs}


def summarise(dataset: str, teacher: TeacherRecord, students: Students) -> dict[str, Any]:
    """Return the summary of a comparison, as fractions."""
    costs = {"teacher": teacher.costs.model_dump()}
    costs |= {student: records.costs.model_dump() for (student, _), records in students.items()}
    figures_of_teacher = teacher.model_dump(exclude={"costs"})
    summary: dict[str, Any] = {"dataset": dataset, "teacher": figures_of_teacher, "students": {}, "costs": costs}
    for (student, method), records in students.items():
        figures = {measure: _figures(estimate_of(records, measure)) for measure in MEASURES}
        summary["students"].setdefault(student, {})[method] = figures
    return summary


def metrics(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return means and costs alone, by student, method and measure: few enough for `dvc metrics` and `dvc exp show`."""
    teacher = {name: round(value, 4) for name, value in summary["teacher"].items()}
    shown: dict[str, Any] = {"teacher": teacher, "costs": summary["costs"]}
    for student, methods in summary["students"].items():
        for method, figures in methods.items():
            means = {name: figures[measure]["mean"] for name, measure in METRICS.items()}
            known = {name: round(mean, 4) for name, mean in means.items() if mean is not None}
            shown.setdefault(student, {})[method] = known
    return shown


def table_cells(students: Students) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table: by student and method, mean and standard deviation over seeds."""
    rows = []
    for (student, method), records in students.items():
        cells = [mean_cell(estimate_of(records, name), scale, "no pairs") for name, (_, scale) in TABLE.items()]
        rows.append([student, method, str(len(records.seeds)), *cells])
    return ["Student", "Method", "n", *(title for title, _ in TABLE.values())], rows


def quality_cells(
    network: str, teacher: TeacherRecord, students: Students, latency: Latency | None = None
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of what networks are worth and what they cost, the teacher's first.

    Args:
        network: the teacher's.
        teacher: its figures.
        students: their figures.
        latency: of all these networks; None: the table is without.
    """
    rows = [[network, "teacher", *(number(getattr(teacher, measure), 100) for measure in QUALITY)]]
    rows[0] += _cost_cells(network, teacher.costs, latency)
    for (student, method), records in students.items():
        cells = [mean_cell(estimate_of(records, measure), 100) for measure in QUALITY]
        rows.append([student, method, *cells, *_cost_cells(student, records.costs, latency)])
    header = ["Network", "Method", *QUALITY.values(), "Parameters", "Multiply-adds", "File, bytes"]
    return header + (["One image, ms", f"{BATCH} images, ms"] if latency is not None else []), rows


def _cost_cells(network: str, costs: Costs, latency: Latency | None) -> list[str]:
    cells = [f"{value:,}" for value in (costs.parameters, costs.multiply_adds, costs.bytes)]
    if latency is not None:
        measured = latency.networks[network]
        cells += [milliseconds(measured.image), milliseconds(measured.batch)]
    return cells


QUALITY_NOTE = (
    "Balanced accuracy and macro F1 are means over the classes that the test split has, whatever the number of their "
    "images. Multiply-adds are of one image, in convolutions and products of matrices: half of the floating point "
    "operations that torch counts."
)


def summary_table(dataset: str, network: str, teacher: TeacherRecord, students: Students) -> str:
    """Return the tables as Markdown, with the teacher above them and a note below each."""
    header, rows = table_cells(students)
    note = (
        "Mean and standard deviation over student seeds, given one teacher and one draw of views; test split. MagSim "
        "and AngSim over the pairs that all students have in common."
    )
    table = markdown_table(header, rows, words=2)
    quality = markdown_table(*quality_cells(network, teacher, students), words=2)
    first = f"Teacher on {dataset}: {teacher.accuracy:.1%} accuracy."
    return "\n\n".join([first, table, note, quality, QUALITY_NOTE]) + "\n"


def seeds_csv(students: Students) -> str:
    """Return every run as CSV: student, method, seed, and its figures; empty where a similarity has no pairs."""
    rows = [
        {"student": student, "method": method} | {name: getattr(record, name) for name in ("seed", *MEASURES)}
        for (student, method), records in students.items()
        for record in records.seeds
    ]
    return plot_csv(("student", "method", "seed", *MEASURES), rows)


def curves_csv(curves: Curves) -> str:
    """Return all learning curves as CSV: student, method, seed, epoch, validation_accuracy (fraction)."""
    rows = [
        {"student": student, "method": method} | dict(row)
        for (student, method), curve in curves.items()
        for row in curve
    ]
    return plot_csv(("student", "method", "seed", "epoch", "validation_accuracy"), rows)


def plot_csv(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return records as CSV for plots, six digits of each number; empty for None."""
    return csv_text(names, [{n: f"{v:.6g}" if isinstance(v, float) else v for n, v in row.items()} for row in rows])


def reference_of(method: str, shown: Mapping[str, Method]) -> str | None:
    """Return the method with which another one is compared; None for those that others are compared with.

    It is the one that distils logits alone (Hinton et al., 2015) from the same source, else from any source, else the
    first method: a gain is credited to a loss only beside the same images.
    """
    plain = [name for name, each in shown.items() if set(each.losses) == {"hinton"}]
    same = [name for name in plain if shown[name].source == shown[method].source]
    reference = [*same, *plain, *shown][0]
    return None if reference == method else reference


class Verdict(NamedTuple):
    """The accuracy of a student by a method beside that by another one."""

    student: str
    method: str
    reference: str
    difference: Difference
    """Of the mean accuracies, fractions."""

    @property
    def text(self) -> str:
        """The difference in points, and its standard error."""
        return difference_cell(self.difference, 100)


def verdicts(students: Students, shown: Mapping[str, Method]) -> list[Verdict]:
    """Return every student and method beside its reference, in the order of `students`."""
    found = []
    for student, method in students:
        reference = reference_of(method, shown)
        if reference is not None:
            less = difference(_accuracy(students[student, method]), _accuracy(students[student, reference]))
            assert less is not None  # there is at least one seed of each
            found.append(Verdict(student, method, reference, less))
    return found


def _accuracy(records: StudentRecords) -> Estimate:
    known = estimate_of(records, "accuracy")
    assert known is not None  # there is at least one seed
    return known


def finding(students: Students, shown: Mapping[str, Method], dataset: str) -> list[str]:
    """Return what came out, a sentence for each student: which differences in accuracy exceed two standard errors."""
    return [_sentence(student, students, shown, dataset) for student in dict.fromkeys(name for name, _ in students)]


def _sentence(student: str, students: Students, shown: Mapping[str, Method], dataset: str) -> str:
    mine = [verdict for verdict in verdicts(students, shown) if verdict.student == student]
    seeds = len(next(records for (name, _), records in students.items() if name == student).seeds)
    start = f"{student} on the test split of {dataset}, n = {seeds} {'seed' if seeds == 1 else 'seeds'} of each method"
    if not mine:
        return f"{start}: {'; '.join(_stated(method, students[student, method]) for method in shown)}."
    groups = []
    for reference in dict.fromkeys(verdict.reference for verdict in mine):
        stated = _stated(reference, students[student, reference])
        groups.append(f"beside {stated}: {_claims([each for each in mine if each.reference == reference], seeds)}")
    spoken_of = {name for verdict in mine for name in (verdict.method, verdict.reference)}
    alone = [_stated(method, students[student, method]) for method in shown if method not in spoken_of]
    if alone:
        groups.append(f"compared with none: {', '.join(alone)}")
    return f"{start}, {'; '.join(groups)}."


def _stated(method: str, records: StudentRecords) -> str:
    known = _accuracy(records)
    deviation = "" if known.deviation is None else f" ± {100 * known.deviation:.1f}"
    return f"{method} ({100 * known.mean:.1f}{deviation} %)"


def _claims(found: Sequence[Verdict], seeds: int) -> str:
    """Return in words what is clear, then what is not."""
    claims, unclear = [], []
    for method, less in ((each.method, each.difference) for each in found):
        error = "" if less.error is None else f"standard error {100 * less.error:.1f}"
        if less.is_clear:
            more = "more" if less.value > 0 else "less"
            claims.append(f"{method} is {100 * abs(less.value):.1f} points {more} accurate ({error})")
        else:
            unclear.append(f"{method} ({', '.join(filter(None, [f'{100 * less.value:+.1f}', error]))})")
    if unclear:
        why = "with one seed no difference is claimed" if seeds == 1 else "not to be told apart"
        claims.append(f"{why}: {', '.join(unclear)}")
    return "; ".join(claims)
