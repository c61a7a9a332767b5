"""What the report shows, from what the stages wrote: tables, charts, pictures and facts."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

from pipeline.core.errors import DataError
from pipeline.core.parameters import Params
from pipeline.evaluate.latency import Latency
from pipeline.evaluate.quality import Disagreements
from pipeline.evaluate.statistics import STANDARD_ERRORS
from pipeline.experiment.results import FEWEST_PAIRS, Results
from pipeline.images.prepared import Prepared
from pipeline.networks.classifier import Classifier
from pipeline.report import charts
from pipeline.report.classes import Confusions, class_table, confusion_pictures, disagreement_pictures
from pipeline.report.facts import facts_of
from pipeline.report.page import Chart, Charts, Content, Picture, Pictures, Row, Table
from pipeline.report.samples import Example, amplification, pictures, typical_examples
from pipeline.report.scenes import decision_maps, maps_note, scenes_of
from pipeline.report.summary import (
    QUALITY_NOTE,
    Curves,
    Students,
    TeacherRecord,
    Verdict,
    estimate_of,
    finding,
    quality_cells,
    table_cells,
    verdicts,
)
from pipeline.shards.reader import BoundaryShards

EXAMPLES = 12  # in the gallery, at most
CURVES_NOTE = (
    "Validation split; lines are means over seeds, bands go from the lowest to the highest. The last epoch is what "
    "counts."
)
NO_CURVES = "None: there is no validation split."
GALLERY_NOTE = (
    f"For each class, of the first {EXAMPLES} that have any, the sample of median distance among the first ones of "
    "view 0: base class b, target class k, probability margin and L2 distance. The perturbation is drawn around "
    "grey, so many times as large."
)
NO_SAMPLES = "None: the dataset has no samples."
NONE_CONVERGED = "None: among the first samples of view 0 none converged."
NO_MAPS = "None: no image has samples towards two classes."


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportInputs:
    """What a report is made from."""

    params: Params
    teacher: TeacherRecord
    students: Students
    confusions: Confusions
    disagreements: Disagreements
    latency: Latency | None
    """Of the teacher's and the students' networks; None where it was not measured."""
    curves: Curves
    views: tuple[Results, str] | None
    """Results of the experiment `views`, and where they are from."""
    shards: BoundaryShards
    probability_margins: charts.Rows
    """Histogram of the probability margins of converged samples."""
    distances: charts.Rows
    """Histogram of their L2 distances."""
    train: Prepared
    models: Mapping[str, Classifier]
    """By name, the teacher first."""
    device: torch.device


def read_curves(path: Path) -> list[dict[str, Any]]:
    """Read seed, epoch and validation accuracy from a file of learning curves; none without a validation split.

    Raises:
        DataError: it is not there, or not what training writes.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [
                {"seed": int(row["seed"]), "epoch": int(row["epoch"])}
                | {"validation_accuracy": float(row["validation_accuracy"])}
                for row in csv.DictReader(file)
                if row.get("validation_accuracy")
            ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); make it with: python -m stages.student --all") from None


OTHER_DATA = "Students from shards were trained on other images than those that are prepared."


def gather(inputs: ReportInputs, progress: Callable[[], Any]) -> Content:
    """Return everything on the page.

    Args:
        inputs: what the stages wrote.
        progress: called after each decision map.
    """
    params, students, manifest = inputs.params, inputs.students, inputs.shards.manifest
    shown = {method: params.method[method] for method in params.methods}
    examples = typical_examples(inputs.shards, inputs.train, EXAMPLES)
    teacher = next(iter(inputs.models.values()))
    scenes = scenes_of(inputs.shards, inputs.train, teacher, examples)
    maps = list(decision_maps(scenes, inputs.models, manifest.class_names, inputs.device, progress))
    return Content(
        title=f"Boundary distillation on {params.dataset.name}",
        compared=_compared(inputs),
        finding=finding(students, shown, params.dataset.name),
        table=_table(students, verdicts(students, shown)),
        quality=_quality(inputs),
        latency=_latency(inputs),
        accuracy=_accuracy(inputs),
        views=_views(inputs),
        curves=_curves(inputs),
        confusion=confusion_pictures(inputs.confusions, inputs.train.class_names),
        classes=class_table(inputs.confusions, inputs.train.class_names),
        disagreements=disagreement_pictures(
            inputs.disagreements, inputs.train.class_names, sum(len(each.seeds) for each in students.values())
        ),
        similarity=_similarity(inputs),
        dataset=_dataset(inputs),
        gallery=Pictures(
            rows=[_gallery_row(example, manifest.class_names) for example in examples],
            note=GALLERY_NOTE if examples else NONE_CONVERGED if manifest.targets else NO_SAMPLES,
        ),
        maps=Pictures(rows=maps, note=maps_note(manifest) if maps else NO_MAPS),
        facts=facts_of(params, manifest, inputs.device),
    )


def _compared(inputs: ReportInputs) -> str:
    params, manifest = inputs.params, inputs.shards.manifest
    return (
        f"{', '.join(params.students)} distilled from {params.teacher.network} "
        f"({inputs.teacher.accuracy:.1%} on the test split) by {', '.join(params.methods)}; {params.seeds} seeds each; "
        f"{manifest.views} precomputed views of {manifest.rows:,} training images, "
        f"{manifest.totals.samples:,} boundary-supporting samples."
        + (f" {OTHER_DATA}" if manifest.digests.train != inputs.train.digest else "")
    )


def _table(students: Students, found: Sequence[Verdict]) -> Table:
    less = {(each.student, each.method): each for each in found}
    references = {each.reference for each in found}
    header, rows = table_cells(students)
    for row in rows:
        verdict = less.get((row[0], row[1]))
        row.insert(4, "" if verdict is None else _difference(verdict, len(references) > 1))
    if found:
        header.insert(4, f"Against {references.pop()}, points" if len(references) == 1 else "Difference, points")
    else:
        rows = [[*row[:4], *row[5:]] for row in rows]
    note = (
        "Mean ± standard deviation over student seeds, given one teacher and one draw of views; test split. "
        "Differences in accuracy have their standard errors in brackets, and are bold beyond "
        f"{STANDARD_ERRORS} of them. MagSim and AngSim are over the pairs that all students have in common."
    )
    return Table(header=header, rows=rows, note=note)


def _difference(verdict: Verdict, named: bool) -> str:
    """Return the cell of a difference; one that is clear begins with a star."""
    star = "*" if verdict.difference.is_clear else ""
    return f"{star}{verdict.text}{f' to {verdict.reference}' if named else ''}"


def _quality(inputs: ReportInputs) -> Table:
    network, measured = inputs.params.teacher.network, inputs.latency
    header, rows = quality_cells(network, inputs.teacher, inputs.students, measured)
    note = QUALITY_NOTE
    if measured is not None:
        note += f" Times are medians on {measured.device}, threads of the CPU: {measured.threads}."
    return Table(header=header, rows=rows, note=note)


def _latency(inputs: ReportInputs) -> Charts:
    measured = inputs.latency
    if measured is None:
        note = Markup(
            "How long the networks take was not measured: <code>python -m stages.latency</code> does it on this "
            "machine, and <code>python -m stages.report</code> then shows it here."
        )
        return Charts(charts=[], note=note)
    rows = [{"method": "teacher", "network": inputs.params.teacher.network, "accuracy": inputs.teacher.accuracy}]
    for (student, method), records in inputs.students.items():
        known = estimate_of(records, "accuracy")
        assert known is not None  # there is at least one seed
        rows.append({"method": method, "network": student, "accuracy": known.mean})
    timed = [row | {"milliseconds": 1e3 * measured.networks[str(row["network"])].image} for row in rows]
    drawn = charts.latency_chart(timed, [*inputs.params.methods, "teacher"])
    return Charts(charts=[Chart("Accuracy against the time of one image", drawn)])


def _runs(students: Students, student: str) -> list[dict[str, Any]]:
    """Return the records of all runs of one student."""
    return [
        {"method": method} | record.model_dump()
        for (name, method), records in students.items()
        if name == student
        for record in records.seeds
    ]


def _accuracy(inputs: ReportInputs) -> Charts:
    methods = inputs.params.methods
    drawn = [
        Chart(student, charts.accuracy_chart(_runs(inputs.students, student), methods))
        for student in inputs.params.students
    ]
    return Charts(charts=drawn)


def _views(inputs: ReportInputs) -> Charts:
    if inputs.views is None:
        note = Markup(
            "Not measured for these parameters: <code>make experiment-views</code> trains with 1 to 16 views, and "
            "<code>python -m stages.report</code> then shows it here. Precomputing lives on views: one alone is "
            "harmful, from four on nothing measurable was lost on digits (docs/RESULTS.md)."
        )
        return Charts(charts=[], note=note)
    results, source = inputs.views
    drawn = dict.fromkeys(cell.labels["student"] for cell in results.cells)
    return Charts(
        charts=[Chart(student, charts.views_chart(results, student)) for student in drawn],
        note=f"From {source}: {results.dataset}, {results.images['train']:,} training images, a teacher of "
        f"its own ({results.teacher:.1%}). Bars are standard errors; dashed: fresh views, the teacher in the loop.",
    )


def _curves(inputs: ReportInputs) -> Charts:
    found = []
    for student in inputs.params.students:
        rows = [
            {"method": method} | dict(row)
            for (name, method), curve in inputs.curves.items()
            if name == student
            for row in curve
        ]
        if rows:
            found.append(Chart(student, charts.curves_chart(rows, inputs.params.methods)))
    return Charts(charts=found, note=CURVES_NOTE if found else NO_CURVES)


def _similarity(inputs: ReportInputs) -> Charts:
    drawn = []
    for student in inputs.params.students:
        rows = _runs(inputs.students, student)
        for measure, title in (("mag_sim_common", "MagSim"), ("ang_sim_common", "AngSim")):
            if any(row[measure] is not None for row in rows):
                chart = charts.similarity_chart(rows, inputs.params.methods, measure, title)
                drawn.append(Chart(f"{title}, {student}", chart))
    pairs = min((record.pairs_common for each in inputs.students.values() for record in each.seeds), default=0)
    note = (
        "How alike the perturbations are that lead to the boundaries of teacher and student, on images that both "
        "classify correctly: ratio of lengths (MagSim) and cosine of the angle (AngSim), 1 for identical networks. "
        f"Over the {pairs:,} pairs that all students have in common"
    )
    return Charts(charts=drawn, note=note + ("." if pairs >= FEWEST_PAIRS else ": too few to say anything."))


def _dataset(inputs: ReportInputs) -> Charts:
    totals, tolerance = inputs.shards.manifest.totals, inputs.params.search.tolerance
    if not inputs.shards.manifest.targets:
        return Charts(
            charts=[], note=f"None: {totals.rows:,} views with the teacher's logits alone (attack.targets 0)."
        )
    statuses = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in totals.statuses.items() if count)
    note = (
        f"{totals.samples:,} samples: {statuses}; shown are those that converged. The margin is tanh(|m| / 2) of the "
        f"logit margin m at the stored sample, 0 on the boundary; dashed: the tolerance, {tolerance}. Distances are L2 "
        "in pixel space [0, 1]."
    )
    drawn = [
        Chart(
            "Probability margin", charts.histogram_chart(inputs.probability_margins, "probability margin", tolerance)
        ),
        Chart("Distance", charts.histogram_chart(inputs.distances, "distance to the image, L2 in pixels")),
    ]
    return Charts(charts=drawn if inputs.probability_margins else [], note=note)


def _gallery_row(example: Example, names: Sequence[str]) -> Row:
    titles = ("image", "sample", "perturbation")
    return Row(
        f"b = {names[example.base]} \u2192 k = {names[example.target]}",
        [Picture(png, title) for png, title in zip(pictures(example), titles, strict=True)],
        [
            f"margin {example.probability_margin:.4f}, distance {example.distance:.2f}, "
            f"drawn x {amplification(example):.1f}"
        ],
    )
