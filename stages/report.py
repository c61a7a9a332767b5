"""Stage report: the comparison as a summary, a table and plot data."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.config import load_params
from pipeline.reporting import StudentRecords, TeacherRecord, accuracy_csv, markdown_table, read_result, summarise
from pipeline.storage import write_atomically, write_json
from stages.cli import errors_in_one_line, params_option, path_option


@click.command()
@params_option
@path_option("--evaluation", "reports/evaluation", "Directory of the evaluation's results.")
@path_option("--out", "reports", "Directory for summary.json, table.md and accuracy.csv.")
@errors_in_one_line
def main(params_path: Path, evaluation: Path, out: Path) -> None:
    """Sum up the comparison over seeds.

    Writes summary.json (mean, standard deviation and n of each figure, fractions), table.md and accuracy.csv.

    Example: python -m stages.report
    """
    params = load_params(params_path)
    students = {
        (student, method): read_result(evaluation / f"{student}-{method}.json", StudentRecords)
        for student in params.students
        for method in params.methods
    }
    summary = summarise(params.dataset.name, read_result(evaluation / "teacher.json", TeacherRecord), students)
    table = markdown_table(summary)
    write_json(out / "summary.json", summary)
    write_atomically(out / "table.md", table)
    write_atomically(out / "accuracy.csv", accuracy_csv(students))
    click.echo(f"{table}\nwrote {out}: summary.json, table.md, accuracy.csv")


if __name__ == "__main__":
    main()
