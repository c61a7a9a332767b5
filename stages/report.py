"""Stage report: the comparison as a page to look at, a summary, a table and plot data."""

from __future__ import annotations

from pathlib import Path

import click
from tqdm import tqdm

from pipeline.core.errors import DataError, ShardError
from pipeline.core.files import write_atomically, write_json
from pipeline.core.parameters import Params, load_params
from pipeline.core.text import one_line
from pipeline.evaluate.latency import Latency
from pipeline.experiment.results import Results, read_results
from pipeline.images.prepared import read_prepared
from pipeline.machine.device import set_up_device
from pipeline.networks.classifier import Classifier
from pipeline.networks.loading import load_for, load_with_digest
from pipeline.report.charts import histogram
from pipeline.report.classes import read_confusions, read_disagreed
from pipeline.report.content import OTHER_DATA, ReportInputs, gather, read_curves
from pipeline.report.page import plots_page, render
from pipeline.report.scenes import maps_to_draw
from pipeline.report.summary import (
    StudentRecords,
    TeacherRecord,
    curves_csv,
    finding,
    metrics,
    plot_csv,
    read_result,
    seeds_csv,
    summarise,
    summary_table,
)
from pipeline.shards.check import check_same_data
from pipeline.shards.quantiles import margins_and_distances
from pipeline.shards.reader import BoundaryShards
from stages.cli import (
    EXIT_CODES,
    NOTHING_WRITTEN,
    errors_in_one_line,
    other_data_option,
    params_option,
    path_option,
)

PUBLISHED_VIEWS = Path("docs/results/views.json")
BIN = ("from", "to", "samples")


@click.command(epilog=EXIT_CODES)
@params_option
@path_option("--evaluation", "reports/evaluation", "Directory of the evaluation's results.")
@path_option("--curves", "reports/students", "Directory of the students' learning curves.")
@path_option("--shards", "data/bss", "Sample dataset.")
@path_option("--prepared", "data/prepared", "Directory of the prepared splits.")
@path_option("--teacher", "models/teacher.safetensors", "Weights of the teacher.")
@path_option("--students", "models/students", "Directory of the students' weights.")
@path_option(
    "--views",
    "reports/experiments/views/results.json",
    "Results of the experiment `views`, if any.",
)
@path_option("--latency", "reports/latency.json", "What `stages.latency` measured, if it did.")
@path_option("--out", "reports", "Directory for these files.")
@other_data_option
@errors_in_one_line(interrupted=NOTHING_WRITTEN)
def main(
    params_path: Path,
    evaluation: Path,
    curves: Path,
    shards: Path,
    prepared: Path,
    teacher: Path,
    students: Path,
    views: Path,
    latency: Path,
    out: Path,
    other_data: bool,
) -> None:
    """Show what came out of a run.

    Writes report.html (one file that opens offline), table.md and summary.json (mean, standard deviation and n of each
    figure, fractions); metrics.json, the means alone, for `dvc metrics`; and for `dvc plots show` seeds.csv (a row for
    each run), curves.csv, the histograms probability_margins.csv and distances.csv, and plots.html, an offline page.

    \b
    Example: python -m stages.report
    """
    params = load_params(params_path)
    names = [(student, method) for student in params.students for method in params.methods]
    records = {name: read_result(evaluation / f"{'-'.join(name)}.json", StudentRecords) for name in names}
    teacher_record = read_result(evaluation / "teacher.json", TeacherRecord)
    train = read_prepared(prepared / "train.h5")
    dataset = BoundaryShards(shards, verify=False)
    loaded = load_with_digest(teacher, train, "teacher")
    if loaded.digest != dataset.manifest.digests.teacher:
        raise ShardError(
            f"{shards}: has samples of another teacher than {teacher}: make it with: python -m stages.attack"
        )
    if not other_data:
        check_same_data(shards, dataset.manifest, train.digest, prepared)
    models: dict[str, Classifier] = {"teacher": loaded.model}
    runs = {"teacher": ["teacher"]}
    for student, method in names:
        title = method if len(params.students) == 1 else f"{student} {method}"
        runs[title] = [f"{student}-{method}-seed-{record.seed}" for record in records[student, method].seeds]
        models[title] = load_for(students / f"{student}-{method}" / "seed-0.safetensors", train, "student")
    margin, distance = margins_and_distances(dataset.folder, dataset.manifest)
    inputs = ReportInputs(
        params=params,
        teacher=teacher_record,
        students=records,
        confusions=read_confusions(evaluation / "confusion.h5", runs),
        disagreements=read_disagreed(evaluation / "disagreements.h5"),
        latency=_latency(latency, params, loaded.model),
        curves={name: read_curves(curves / "-".join(name) / "curves.csv") for name in names},
        views=_views(views, params),
        shards=dataset,
        probability_margins=histogram(margin, params.search.tolerance),
        distances=histogram(distance),
        train=train,
        models=models,
        device=set_up_device(params.runtime),
    )
    with tqdm(
        total=maps_to_draw(models, dataset.manifest), desc="report", unit="map", disable=None, leave=False
    ) as bar:
        page = render(gather(inputs, bar.update))
    shown = {method: params.method[method] for method in params.methods}
    sentences = "\n".join(finding(records, shown, params.dataset.name))
    table = f"{summary_table(params.dataset.name, params.teacher.network, teacher_record, records)}\n{sentences}\n"
    if dataset.manifest.digests.train != train.digest:
        table += f"\n{OTHER_DATA}\n"
    summary = summarise(params.dataset.name, teacher_record, records)
    write_json(out / "summary.json", summary)
    write_json(out / "metrics.json", metrics(summary))
    for name, content in {
        "table.md": table,
        "seeds.csv": seeds_csv(records),
        "curves.csv": curves_csv(inputs.curves),
        "probability_margins.csv": plot_csv(BIN, inputs.probability_margins),
        "distances.csv": plot_csv(BIN, inputs.distances),
        "plots.html": plots_page(),
        "report.html": page,
    }.items():
        write_atomically(out / name, content)
    click.echo(f"{table}\nwrote {out / 'report.html'}, and table.md, summary.json and plot data beside it")


def _latency(path: Path, params: Params, teacher: Classifier) -> Latency | None:
    """Read what was measured, if it is of these networks for these images."""
    if not path.is_file():
        return None
    try:
        measured = Latency.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # pydantic's errors are ValueErrors
        raise DataError(f"{path}: cannot be read ({one_line(error)}); make it with: python -m stages.latency") from None
    wanted = {params.teacher.network, *params.students}
    same = measured.image_shape == teacher.architecture.image_shape
    return measured if same and wanted <= measured.networks.keys() else None


def _views(path: Path, params: Params) -> tuple[Results, str] | None:
    """Read results of the experiment on views: those made here, else those published for the same dataset."""
    for source in (path, PUBLISHED_VIEWS):
        if source.is_file():
            results = read_results(source)
            if "views" not in results.cells[0].labels:
                raise DataError(f"{source}: is of an experiment without the axis `views`: --views names another file")
            students = {cell.labels["student"] for cell in results.cells}
            if results.dataset == params.dataset.name and students & set(params.students):
                return results, str(source)
    return None


if __name__ == "__main__":
    main()
