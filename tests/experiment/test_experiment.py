"""Experiments: what varies, the results of a small one, and what tables say of them."""

import json
import math
import shutil
import time

import numpy as np
import pytest
import torch

from pipeline.core.errors import DataError, ParameterError
from pipeline.core.provenance import ROOT, fingerprint
from pipeline.evaluate.statistics import difference, estimate
from pipeline.experiment.figure import experiment_svg, number_in
from pipeline.experiment.records import RunRecords
from pipeline.experiment.results import Cell, Cost, Results, Run, read_results, reference_of, results_table
from pipeline.experiment.spec import check_comparisons, labels_of, load_experiment, variants
from pipeline.networks.stack import MEMBERS
from pipeline.networks.weights import load_weights, save_weights
from pipeline.training.objective import Objective
from tests.support.files import contents, make_project, run_stage, tiny_params, write_params

FILES = sorted((ROOT / "experiments").glob("*.yaml"))
TWO_WORKERS = {"runtime.workers": 2, "runtime.threads": 2}
NAMES = {path.stem for path in FILES}


def written(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def combinations(tmp_path, text, **changes):
    return list(variants(load_experiment(written(tmp_path, text)), tiny_params(changes)))


def test_axes_are_combined_and_laid_over_the_values_of_all(tmp_path):
    found = combinations(
        tmp_path,
        """
title: mine
values: {seeds: 3, attack.views: 5}
axes:
  views: {few: {attack.views: 1}, some: {}}
  rate: {low: {training.learning_rate: 0.001}, high: {training.learning_rate: 1}}
""",
    )
    assert [each.labels for each in found] == [
        {"views": views, "rate": rate} for views in ("few", "some") for rate in ("low", "high")
    ]
    assert [each.params.attack.views for each in found] == [1, 1, 5, 5]
    assert [each.params.training.learning_rate for each in found] == [0.001, 1, 0.001, 1]
    assert {each.params.seeds for each in found} == {3}


def test_without_axes_there_is_one_variant(tmp_path):
    (only,) = combinations(tmp_path, "title: mine\nvalues: {methods: [dkd]}\n")
    assert only.labels == {}
    assert only.params.methods == ["dkd"]


@pytest.mark.parametrize(("fraction", "epochs"), [(1, 8), (0.5, 16), (0.05, 160)])
def test_fewer_images_are_seen_more_often(tmp_path, fraction, epochs):
    (only,) = combinations(tmp_path, f"title: mine\nvalues: {{train_fraction: {fraction}}}\n", **{"training.epochs": 8})
    assert (only.train_fraction, only.params.training.epochs) == (fraction, epochs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: mine\nvalues: {attack.viewz: 3}", "mine: attack.viewz: unknown parameter"),
        ("title: mine\nvalues: {attack.views: 0}", "mine: attack.views: Input should be greater than or equal to 1"),
        ("title: mine\nvalues: {teacher.seed: 3}", "mine: 'teacher.seed' does not vary in an experiment, only attack"),
        ("title: mine\nvalues: {teacher: 3}", "mine: teacher: expected the name of a weights file, got 3"),
        ("title: mine\nvalues: {runtime.threads: 3}", "'runtime.threads' does not vary"),
        ("title: mine\nvalues: {method.nowhere.at.weight: 3}", "unknown parameter 'method.nowhere.at.weight'"),
        ("title: mine\nvalues: {methods: [nowhere]}", "'methods' names 'nowhere'"),
        ("title: mine\nvalues: {train_fraction: 0}", "train_fraction: expected more than 0 and at most 1, got 0"),
        ("title: mine\nvalues: {train_fraction: many}", "got many"),
        ("title: mine\nvalues: {training.precision: bf16-mixed}", "'training.precision' does not vary"),
        ("title: mine\nvalues: {training.epochs: ten}", "training.epochs: Input should be a valid integer"),
        ("title: mine\nvalues: {training: null}", "training: Input should be a valid dictionary"),
        ("title: mine\naxes: {views: {}}", "axes.views: Dictionary should have at least 1 item"),
        ("title: mine\naxes: {method: {a: {}}}", "no axis is called 'method'"),
        ("title: mine\nfigure: views", "figure: expected an axis (there is none), got 'views'"),
        ("title: mine\naxes: {views: {one: {attack.views: 0}}}", "views one: attack.views"),
        ("title: mine\ntile: 3", "mine.yaml: tile: unknown parameter"),
        ("values: {}", "mine.yaml: title: missing"),
        ("title: [", "mine.yaml: not valid YAML"),
        ("- 3", "mine.yaml"),
    ],
)
def test_a_bad_experiment_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ParameterError) as caught:
        combinations(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "compared", ["references: {less: {methd: bss}}", "references: {less: {method: bs}}", "floor: {method: bs}"]
)
def test_a_comparison_with_no_row_is_refused(tmp_path, compared):
    experiment = load_experiment(written(tmp_path, f"title: mine\nvalues: {{methods: [bss]}}\n{compared}\n"))
    cells = [labels for variant in variants(experiment, tiny_params()) for labels in labels_of(variant)]
    with pytest.raises(ParameterError, match="no row has"):
        check_comparisons(experiment, cells)


def test_an_experiment_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ParameterError, match=r"nowhere\.yaml: cannot be read"):
        load_experiment(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_experiments_of_the_project_are_sound(path):
    experiment = load_experiment(path)
    found = list(variants(experiment, tiny_params()))
    cells = [
        each.labels | {"student": student, "method": method}
        for each in found
        for student in each.params.students
        for method in each.params.methods
    ]
    assert len(cells) == len({tuple(sorted(cell.items())) for cell in cells})
    for title, changes in experiment.references.items():
        compared = [cell for cell in cells if cell | changes != cell and cell | changes in cells]
        assert compared, f"nothing is compared with '{title}'"
    if experiment.floor:
        assert any(cell | experiment.floor in cells for cell in cells)
    check_comparisons(experiment, cells)
    if experiment.figure:
        assert experiment.figure in experiment.axes


def test_make_knows_the_experiments():
    makefile = (ROOT / "Makefile").read_text()
    names = makefile.split("EXPERIMENTS := ")[1].split("\n")[0].split()
    assert len(names) == len(set(names))
    assert set(names) == {name for name in NAMES if not name.startswith(("photographs", "benchmark"))}
    assert "make experiment-NAME  one comparison: $(EXPERIMENTS) photographs" in makefile


# Estimates


def test_an_estimate_of_one_draw_is_that_of_its_seeds():
    values = np.random.default_rng(0).normal(size=9)
    found = estimate([list(values)])
    assert found.mean == pytest.approx(values.mean())
    assert found.deviation == pytest.approx(values.std(ddof=1))
    assert found.error == pytest.approx(values.std(ddof=1) / 3)
    assert found.runs == 9


def test_the_standard_error_is_honest_about_draws_that_share_their_seeds():
    # Value = effect of the draw + effect of the seed + noise: the error of the mean, against many repetitions.
    generator = np.random.default_rng(1)
    draws, seeds, errors, means = 4, 6, [], []
    for _ in range(2000):
        table = generator.normal(size=(draws, 1)) + 0.5 * generator.normal(size=(1, seeds))
        table = table + 0.3 * generator.normal(size=(draws, seeds))
        found = estimate(table.tolist())
        errors.append(found.error)
        means.append(found.mean)
    true = np.std(means)
    mean_square = math.sqrt(np.mean(np.square(errors)))
    # Noise counts twice in it, so that it is a little too large, never too small.
    assert true * 0.97 < mean_square < true * 1.1


@pytest.mark.parametrize("values", [[[0.5]], [[0.5, 0.6], [0.7]]])
def test_without_spread_there_is_no_standard_error(values):
    assert estimate(values).error is None


def test_draws_of_one_seed_have_a_standard_error():
    assert estimate([[0.90], [0.92], [0.94]]).error == pytest.approx(0.02 / math.sqrt(3))


def test_no_values_have_no_estimate():
    assert estimate([[], []]) is None


def run_with(accuracy, mag_sim=0.5):
    return Run(validation=accuracy, accuracy=accuracy, agreement=accuracy, mag_sim=mag_sim, ang_sim=0.25)


def results_of(cells, references=None, floor=None, figure=None, cost=None, pairs=40):
    return Results(
        title="mine",
        dataset="digits",
        teacher=0.99,
        images={"train": 10, "test": 5},
        pairs=pairs,
        references=references or {},
        floor=floor,
        costs=cost is not None,
        figure=figure,
        cells=[
            Cell(labels=labels, runs=[[run_with(value) for value in draw] for draw in draws], cost=cost)
            for labels, draws in cells
        ],
    )


TWO = [
    ({"method": "hinton"}, [[0.90, 0.92, 0.94, 0.96]]),
    ({"method": "bss"}, [[0.95, 0.97, 0.97, 0.99]]),
]


def less(cell, reference, measure):
    return difference(estimate(cell.values(measure)), estimate(reference.values(measure)))


def test_a_difference_is_clear_beyond_two_standard_errors():
    results = results_of(TWO)
    hinton, bss = results.cells
    found = less(bss, hinton, "accuracy")
    # 3 degrees of freedom: deviations 0.02582 and 0.01633, over 2, their hypotenuse 0.01528.
    assert found.value == pytest.approx(0.04)
    assert found.error == pytest.approx(0.015275, rel=1e-3)
    assert found.is_clear
    assert not less(bss, hinton, "ang_sim").is_clear
    assert less(bss, hinton, "ang_sim").value == 0


def test_a_reference_differs_in_the_labels_that_it_names():
    labels = [{"views": views, "method": method} for views in ("1", "2") for method in ("hinton", "bss")]
    results = results_of([(each, [[0.5, 0.6]]) for each in labels])
    assert reference_of(results, results.cells[3], {"method": "hinton"}) is results.cells[2]
    assert reference_of(results, results.cells[3], {"method": "hinton", "views": "1"}) is results.cells[0]
    assert reference_of(results, results.cells[2], {"method": "hinton"}) is None
    assert reference_of(results, results.cells[3], {"views": "8"}) is None


def test_the_table_has_means_spread_and_marks_clear_differences():
    table = results_table(results_of(TWO, {"less hinton": {"method": "hinton"}}))
    header, rule, hinton, bss, _, note = table.splitlines()
    assert header == (
        "| Method | n | Validation, % | Test, % | MagSim | AngSim | Validation, less hinton | Test, less hinton "
        "| AngSim, less hinton |"
    )
    assert rule.count("|") == header.count("|")
    assert hinton == "| hinton | 4 | 93.0 ± 2.6 | 93.0 ± 2.6 | 0.500 ± 0.000 | 0.250 ± 0.000 | - | - | - |"
    assert bss == (
        "| bss | 4 | 97.0 ± 1.6 | 97.0 ± 1.6 | 0.500 ± 0.000 | 0.250 ± 0.000 | **+4.0** (1.5) | **+4.0** (1.5) "
        "| +0.000 (0.000) |"
    )
    assert "digits, images: train 10, test 5; teacher 99.0% on test." in note
    assert "Similarities: of pairs of perturbations that all students have (40)." in note


def test_the_table_counts_runs_below_the_floor():
    # The floor is 0.93 - 3 x 0.0258 = 0.8525.
    cells = [*TWO, ({"method": "far"}, [[0.95, 0.86, 0.85, 0.30]])]
    lines = results_table(results_of(cells, floor={"method": "hinton"})).splitlines()
    assert lines[0].endswith("| Lowest run, % | Runs below the floor |")
    assert [line.split("|")[-3:-1] for line in lines[2:5]] == [[" 90.0 ", " 0 "], [" 95.0 ", " 0 "], [" 30.0 ", " 2 "]]


def test_every_student_has_a_floor_of_its_own():
    cells = [
        ({"student": student, "method": method}, [[mean - 0.01, mean, mean + 0.01]])
        for student, mean in (("big", 0.95), ("small", 0.81))
        for method in ("hinton", "bss")
    ]
    lines = results_table(results_of(cells, floor={"method": "hinton"})).splitlines()
    assert [line.split("|")[-2] for line in lines[2:6]] == [" 0 "] * 4


def test_similarities_of_hardly_any_pairs_are_not_shown():
    table = results_table(results_of(TWO, {"less hinton": {"method": "hinton"}}, pairs=29))
    assert table.splitlines()[0] == (
        "| Method | n | Validation, % | Test, % | Validation, less hinton | Test, less hinton |"
    )
    assert "Similarities: not shown, for want of pairs of perturbations that all students have (29)." in table


def test_the_table_has_what_samples_took_where_it_is_asked_for():
    cost = Cost(samples=2000, bytes=3_450_000, evaluations=6500, converged=1890)
    lines = results_table(results_of(TWO, cost=cost)).splitlines()
    assert lines[0].endswith("| Samples | On the boundary, % | Gradients a sample | MB |")
    assert lines[2].endswith("| 2,000 | 94.5 | 3.2 | 3.5 |")


def test_several_draws_are_told():
    table = results_table(results_of([({"method": "bss"}, [[0.5, 0.6], [0.7, 0.8]]), TWO[0]]))
    assert "| bss | 2 x 2 | 65.0 ± 7.1 |" in table


def test_the_figure_has_a_line_for_each_method_along_the_axis():
    labels = [{"views": views, "method": method} for views in ("loop", "1", "16") for method in ("hinton", "bss")]
    results = results_of([(each, [[0.5, 0.6, 0.7]]) for each in labels], figure="views")
    svg = experiment_svg(results, "views")
    assert svg == experiment_svg(results, "views")
    for text in ("hinton", "bss", "views (dashed: loop)", "test accuracy, %", "16"):
        assert f"<!-- {text} -->" in svg


@pytest.mark.parametrize(
    ("label", "number"), [("50 %", 50), ("16", 16), ("0.5", 0.5), ("1e-3", 0.001), ("0.1.2", None), ("loop", None)]
)
def test_the_number_of_a_label(label, number):
    assert number_in(label) == number


def test_results_survive_their_file_and_others_are_refused(tmp_path):
    results = results_of(TWO)
    (tmp_path / "results.json").write_text(results.model_dump_json())
    assert read_results(tmp_path / "results.json") == results
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(DataError, match=r"results\.json: cannot be read"):
        read_results(tmp_path / "results.json")


@pytest.mark.parametrize("path", sorted((ROOT / "docs/results").glob("*.json")), ids=lambda path: path.stem)
def test_the_tables_of_the_documentation_are_those_of_the_results(path):
    place = (ROOT / "docs/RESULTS.md").read_text().split(f"<!-- experiment {path.stem} -->\n")[1]
    assert place.startswith(results_table(read_results(path)))


# The command


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with tiny parameters, prepared splits and a teacher."""
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path, TWO_WORKERS)
    return tmp_path


SMALL = """
title: Small
draws: 2
values: {methods: [hinton, bss], seeds: 2}
axes:
  views:
    loop: {method.hinton.source: online, method.bss.source: online}
    "1": {attack.views: 1}
    "2": {attack.views: 2, train_fraction: 0.5}
references:
  less the loop: {views: loop}
figure: views
"""


def test_an_experiment_runs_and_finds_what_is_finished(project):
    path = written(project, SMALL)
    first = run_stage("experiment", path)
    assert first.exit_code == 0, first.stderr
    folder = project / "reports/experiments/mine"
    assert "wrote reports/experiments/mine: results.json, table.md, figure.svg (20 students)" in first.stdout
    results = read_results(folder / "results.json")
    assert [cell.labels["views"] for cell in results.cells] == ["loop", "loop", "1", "1", "2", "2"]
    assert results.images == {"train": 64, "validation": 24, "test": 32}
    loop, _, _, one, _, half = results.cells
    assert loop.cost is None
    assert (one.cost.samples, half.cost.samples) == (64, 64)  # one view of all, two of half
    assert 0 < one.cost.converged <= 64
    assert one.cost.evaluations >= one.cost.converged
    # The loop does not depend on the draw of views, and has one.
    assert [len(cell.runs) for cell in results.cells] == [1, 1, 2, 2, 2, 2]
    assert one.runs[0] != one.runs[1]
    for cell in results.cells:
        assert all(0 <= run.accuracy <= 1 and 0 <= run.validation <= 1 for draw in cell.runs for run in draw)
    before = {name: (folder / name).read_bytes() for name in ("results.json", "table.md", "figure.svg")}
    stamps = {each: each.stat().st_mtime_ns for each in (project / ".work/fits").rglob("weights.safetensors")}
    assert len(stamps) == 4 + 2 * 4 * MEMBERS  # those of shards are stacks, of which two seeds are wanted
    again = run_stage("experiment", path)
    assert again.exit_code == 0, again.stderr
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert {each: each.stat().st_mtime_ns for each in (project / ".work/fits").rglob("weights.safetensors")} == stamps


def test_a_plan_counts_the_runs_and_makes_nothing(project):
    # Runs of `original` are the same with one view and with two, and so is one of the two draws.
    path = written(project, SMALL + "best_epoch_on_test: true\n")
    path.write_text(path.read_text().replace("[hinton, bss]", "[original, bss]").replace(", train_fraction: 0.5", ""))
    before = contents(project)
    first = run_stage("experiment", path, "--plan")
    assert first.exit_code == 0, first.stderr
    # original: 2 seeds; bss: 2 seeds in the loop, and of two draws with one view and with two.
    assert first.stdout.startswith("0 runs are in reports/experiments/mine/runs, 12 are to be trained: about ")
    assert first.stdout.endswith(" hours by 2 workers on cpu, without samples and comparisons\n")
    assert contents(project) == before
    assert run_stage("experiment", path).exit_code == 0
    records = sorted((project / "reports/experiments/mine/runs").iterdir())
    assert len(records) == 12
    records[0].unlink()
    assert "11 runs are in reports/experiments/mine/runs, 1 are" in run_stage("experiment", path, "--plan").stdout


@pytest.mark.parametrize("seeds", [2, 8])
def test_the_hours_are_those_of_the_runs_of_all_images(project, monkeypatch, seeds):
    loss = Objective.loss

    def slow(self, *arguments):
        time.sleep(0.1)
        return loss(self, *arguments)

    monkeypatch.setattr(Objective, "loss", slow)
    text = f"title: Mine\nvalues: {{methods: [bss], seeds: {seeds}, training.epochs: 3000, attack.views: 1}}\n"
    result = run_stage("experiment", written(project, text), "--plan")
    assert result.exit_code == 0, result.stderr
    assert f", {seeds} are to be trained: about " in result.stdout
    # 3,000 epochs of four steps, of four seeds at once, and two such groups side by side; a busy machine takes longer.
    least = 3000 * 4 * 0.1 / 3600
    assert least < float(result.stdout.split("about ")[1].split()[0].replace(",", "")) < 2.5 * least


TWO_TEACHERS = """
title: Teachers
values: {methods: [hinton, at], seeds: 2, attack.views: 1}
axes:
  teacher:
    first: {}
    second: {teacher: second.safetensors}
"""


def test_students_of_several_teachers_are_those_of_each_alone(project):
    # The same network with another last bias: another file, other logits.
    second = load_weights(project / "models/teacher.safetensors")
    with torch.no_grad():
        second.network.linear.bias[0] += 1
    save_weights(second, project / "second.safetensors")
    result = run_stage("experiment", written(project, TWO_TEACHERS))
    assert result.exit_code == 0, result.stderr
    both = read_results(project / "reports/experiments/mine/results.json")
    table = results_table(both)
    shutil.rmtree(project / ".work")
    path = written(project, "title: Teachers\nvalues: {methods: [hinton, at], seeds: 2, attack.views: 1}\n")
    for label, file in (("first", "models/teacher.safetensors"), ("second", "second.safetensors")):
        assert run_stage("experiment", path, "--teacher", file, "--out", label).exit_code == 0
        alone = read_results(project / label / "results.json")
        assert [cell.runs for cell in both.cells if cell.labels["teacher"] == label] == [
            cell.runs for cell in alone.cells
        ]
        assert both.teacher[file] == alone.teacher
        assert f"{file} {alone.teacher:.1%}" in table
        assert both.pairs <= alone.pairs
    assert both.cells[0].runs != both.cells[2].runs
    assert both.cells[1].runs != both.cells[3].runs


def test_a_teacher_that_is_not_there_is_named(project):
    result = run_stage("experiment", written(project, TWO_TEACHERS))
    assert result.exit_code == 1
    assert "second.safetensors" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_results_are_those_of_the_stages(project):
    path = written(project, "title: Small\nvalues: {methods: [bss], seeds: 2, attack.views: 2}\n")
    assert run_stage("experiment", path).exit_code == 0
    (cell,) = read_results(project / "reports/experiments/mine/results.json").cells
    write_params(project / "params.yaml", {"methods": ["bss"]} | TWO_WORKERS)
    for command in (("attack",), ("student", "--all"), ("evaluate",)):
        result = run_stage(*command)
        assert result.exit_code == 0, result.stderr
    records = json.loads((project / "reports/evaluation/resnet8w2-bss.json").read_text())["seeds"]
    assert [run.accuracy for run in cell.runs[0]] == [record["accuracy"] for record in records]
    for name in ("distance", "robust_accuracy", "calibration_error", "plane_agreement"):
        assert [getattr(run, name) for run in cell.runs[0]] == [record[name] for record in records]
    wanted = [record["mag_sim_common"] for record in records]  # float16 in the records
    assert [run.mag_sim for run in cell.runs[0]] == pytest.approx(wanted, rel=1e-3)


def test_an_experiment_goes_on_on_another_machine_from_the_files_of_its_runs(project):
    path = written(project, "title: Small\nvalues: {methods: [kd, bss], seeds: 2, attack.views: 1}\n")
    assert run_stage("experiment", path, "--runs", "kept").exit_code == 0
    folder = project / "reports/experiments/mine"
    before = {name: (folder / name).read_bytes() for name in ("results.json", "table.md")}
    files = sorted((project / "kept").iterdir())
    assert len(files) == 4
    assert max(file.stat().st_size for file in files) < 20_000
    shutil.rmtree(project / ".work")
    files[0].unlink()
    again = run_stage("experiment", path, "--runs", "kept")
    assert again.exit_code == 0, again.stderr
    assert (
        len(list((project / ".work/fits").rglob("weights.safetensors"))) == MEMBERS
    )  # the stack of the one that was not there
    assert {name: (folder / name).read_bytes() for name in before} == before
    # Without a reason to train, no samples are made either.
    shutil.rmtree(project / ".work")
    assert run_stage("experiment", path, "--runs", "kept").exit_code == 0
    assert not (project / ".work/fits").exists()
    assert not (project / ".work/shards").exists()


def test_runs_of_other_code_count_where_that_is_wanted_and_the_table_says_so(project):
    path = written(project, "title: Small\nvalues: {methods: [original, kd], seeds: 2, attack.views: 1}\n")
    assert run_stage("experiment", path, "--runs", "kept").exit_code == 0
    table = project / "reports/experiments/mine/table.md"
    assert "states of the code" not in table.read_text()
    for record in sorted((project / "kept").glob("*original-seed-0*")):
        record.write_text(json.dumps(json.loads(record.read_text()) | {"code": "0" * 64, "accuracy": 0.125}))
    result = run_stage("experiment", path, "--runs", "kept", "--any-code")
    assert result.exit_code == 0, result.stderr
    results = read_results(project / "reports/experiments/mine/results.json")
    assert results.cells[0].runs[0][0].accuracy == 0.125
    assert "Runs were made by 2 states of the code." in table.read_text()
    assert run_stage("experiment", path, "--runs", "kept").exit_code == 0
    results = read_results(project / "reports/experiments/mine/results.json")
    assert results.cells[0].runs[0][0].accuracy != 0.125
    assert "states of the code" not in table.read_text()


BY_EPOCHS = """
title: Mine
values: {methods: [original], seeds: 2, training.milestones: [], training.learning_rate: 0.02}
axes: {epochs: {"1": {training.epochs: 1}, "2": {training.epochs: 2}, "3": {training.epochs: 3}}}
"""


def test_the_best_epoch_is_the_best_of_runs_that_end_there(project):
    # At one rate, a run of fewer epochs is the beginning of a longer one.
    path = written(project, BY_EPOCHS)
    assert run_stage("experiment", path, "--runs", "kept").exit_code == 0
    plain = read_results(project / "reports/experiments/mine/results.json")
    assert "as others print" not in (project / "reports/experiments/mine/table.md").read_text()
    names = {file.name for file in (project / "kept").iterdir()}
    written(project, BY_EPOCHS + "best_epoch_on_test: true\n")
    result = run_stage("experiment", path, "--runs", "kept")
    assert result.exit_code == 0, result.stderr
    assert {file.name for file in (project / "kept").iterdir()} == names
    results = read_results(project / "reports/experiments/mine/results.json")
    for seed in range(2):
        runs = [cell.runs[0][seed] for cell in plain.cells]
        for number, cell in enumerate(results.cells):
            best = max(run.accuracy for run in runs[: number + 1])
            assert cell.runs[0][seed] == runs[number].model_copy(update={"test_accuracy_best_epoch": best})
    table = (project / "reports/experiments/mine/table.md").read_text()
    assert "| Test, % | Best epoch on test (as others print), % |" in table
    assert "chosen by test itself, as others do; no other figure is." in table
    # Records that have it serve where nobody asks for it.
    shutil.rmtree(project / ".work")
    written(project, BY_EPOCHS)
    assert run_stage("experiment", path, "--runs", "kept").exit_code == 0
    assert not (project / ".work/fits").exists()
    assert read_results(project / "reports/experiments/mine/results.json") == plain


@pytest.mark.parametrize("path", sorted((ROOT / "docs/results/photographs").glob("*.json")), ids=lambda path: path.stem)
def test_the_finished_runs_of_the_documentation_are_found(path):
    kept = json.loads(path.read_text())
    assert kept["wanted"] == fingerprint(kept["reads"], kept["seed"])
    found = RunRecords(path.parent).find(kept["student"], kept["method"], kept["seed"], kept["wanted"], kept["code"])
    assert found is not None
    assert found.accuracy == kept["accuracy"]


@pytest.mark.parametrize("text", ["{", "{}", '{"student": 3}'])
def test_a_damaged_record_is_named(project, text):
    path = written(project, "title: Small\nvalues: {methods: [original], seeds: 1}\n")
    assert run_stage("experiment", path, "--runs", "kept").exit_code == 0
    (record,) = (project / "kept").iterdir()
    record.write_text(text)
    result = run_stage("experiment", path, "--runs", "kept")
    assert result.exit_code == 1
    assert f"kept/{record.name}: cannot be read" in result.stderr
    assert "delete it to train again" in result.stderr


def test_a_run_that_fails_does_not_keep_others_from_their_record(project):
    text = "title: Mine\nvalues: {seeds: 2}\naxes: {rate: {high: {training.learning_rate: 1.0e+9}, low: {}}}\n"
    result = run_stage("experiment", written(project, text), "--runs", "kept")
    assert result.exit_code == 1
    assert "; the other runs go on" in result.stderr
    records = [json.loads(each.read_text()) for each in (project / "kept").iterdir()]
    assert len(records) == 2 * len(tiny_params().methods)
    assert f"{len(records)} of {2 * len(records)} runs failed" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere.yaml",), 2, "nowhere.yaml: cannot be read"),
        (("mine.yaml", "--teacher", "nowhere.safetensors"), 1, "nowhere.safetensors: no such weights file"),
        (("mine.yaml", "--prepared", "nowhere"), 1, "nowhere/train.h5: no such prepared file"),
    ],
)
def test_what_is_missing_is_told_in_one_line(project, arguments, code, message):
    written(project, SMALL)
    result = run_stage("experiment", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (project / "reports").exists()


def test_a_run_that_fails_is_named(project):
    text = (
        "title: Mine\nvalues: {methods: [original], seeds: 2}\naxes: {rate: {high: {training.learning_rate: 1.0e+9}}}\n"
    )
    result = run_stage("experiment", written(project, text))
    assert result.exit_code == 1
    assert "error: rate high, resnet8w2-original seeds 0 to 3: the loss of seed 0 is" in result.stderr
    assert "leave out of the experiment" in result.stderr


def test_several_devices_are_refused(project):
    make_project(project, TWO_WORKERS | {"runtime.devices": 2})
    result = run_stage("experiment", written(project, SMALL))
    assert result.exit_code == 2
    assert "an experiment trains each run on one device" in result.stderr


def test_too_few_images_for_the_classes_are_refused(project):
    result = run_stage("experiment", written(project, "title: Mine\nvalues: {train_fraction: 0.03}\n"))
    assert result.exit_code == 1
    assert "no image of class" in result.stderr
