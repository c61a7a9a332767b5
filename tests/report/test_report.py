"""The report: what it says, draws and shows, against independent oracles; and the page in a browser."""

import base64
import csv
import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import altair as alt
import numpy as np
import pytest
import torch
import vl_convert
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from pipeline.core.errors import DataError
from pipeline.core.hdf5 import written_hdf5
from pipeline.core.parameters import Method, load_params
from pipeline.core.provenance import ROOT
from pipeline.core.status import Status
from pipeline.core.timings import RunRecord, read_records, record_run
from pipeline.evaluate.costs import Costs
from pipeline.evaluate.latency import Latency, NetworkLatency, milliseconds
from pipeline.experiment.results import read_results
from pipeline.images.prepared import read_prepared, write_prepared
from pipeline.networks.classifier import Architecture
from pipeline.networks.weights import load_weights
from pipeline.report import charts, decision_map
from pipeline.report.classes import (
    THUMBNAIL,
    class_table,
    confusion_pictures,
    read_confusions,
    read_disagreed,
    thumbnail,
)
from pipeline.report.content import read_curves
from pipeline.report.decision_map import Scene, plane_through, unit_square
from pipeline.report.page import Chart, Charts, Content, Picture, Pictures, Row, Table, render
from pipeline.report.samples import amplification, pictures, png, typical_examples
from pipeline.report.scenes import scenes_of
from pipeline.report.summary import (
    Record,
    StudentRecords,
    TeacherRecord,
    csv_text,
    curves_csv,
    finding,
    metrics,
    quality_cells,
    reference_of,
    seeds_csv,
    summarise,
    verdicts,
)
from pipeline.shards.reader import BoundaryShards
from stages.report import _latency as latency_of
from tests.support.files import CLASS_NAMES, finish, fork_stage, make_project, run_stage, tiny_splits, tiny_teacher
from tests.support.helpers import (
    CPU,
    attack_parameters,
    bss_parameters,
    hinton_parameters,
    in_memory,
    make_shards,
    random_images,
    random_linear_classifier,
    random_prepared,
    tiny_resnet,
    untrained,
    view_parameters,
)
from tests.support.projects import commit, dvc, git, new_project

HINTON, BSS = hinton_parameters(), bss_parameters()
METHODS = {
    "original": Method(source="fresh"),
    "hinton": Method(source="shards", hinton=HINTON),
    "bss": Method(source="shards", hinton=HINTON, bss=BSS),
    "hinton_online": Method(source="online", hinton=HINTON),
    "bss_online": Method(source="online", hinton=HINTON, bss=BSS),
}
MARKDOWN = re.compile(r"`|\*\*|\]\(|^#+ ", re.MULTILINE)
COSTS = Costs(parameters=1000, multiply_adds=20_000, bytes=4321)
TEACHER = TeacherRecord(
    accuracy=0.98765, balanced_accuracy=0.9, macro_f1=0.8, costs=Costs(parameters=3000, multiply_adds=1, bytes=2)
)
HOSTILE = "</script><script>alert(1)</script>\"'{{ 7 * 7 }}{% raw %}<!--&"

CLASSES = (HOSTILE, "$\\frac{$", "{{ braces }}", "Größe & <b>" + 80 * "x")


def some(*names):
    return {name: METHODS[name] for name in names}


def record(seed, accuracy, similarity=None):
    return Record(
        seed=seed,
        accuracy=accuracy,
        balanced_accuracy=accuracy / 2,
        macro_f1=accuracy / 4,
        agreement=accuracy,
        teacher_divergence=0.1,
        mag_sim=similarity,
        ang_sim=similarity,
        mag_sim_common=similarity,
        ang_sim_common=similarity,
        pairs_common=0 if similarity is None else 40,
    )


def student(*seeds, costs=COSTS):
    return StudentRecords(costs=costs, seeds=list(seeds))


def runs(*accuracies):
    return student(*(record(seed, accuracy) for seed, accuracy in enumerate(accuracies)))


# What came out: the sentence and the table's differences


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (("original", "hinton", "bss"), {"original": "hinton", "hinton": None, "bss": "hinton"}),
        (("bss", "original"), {"bss": None, "original": "bss"}),
        (("bss_online", "hinton"), {"bss_online": "hinton", "hinton": None}),
        (
            ("bss", "bss_online", "hinton_online", "hinton", "original"),
            {
                "bss": "hinton",
                "bss_online": "hinton_online",
                "hinton_online": None,
                "hinton": None,
                "original": "hinton_online",
            },
        ),
    ],
)
def test_methods_are_compared_with_plain_distillation_from_their_own_source(shown, expected):
    assert {name: reference_of(name, some(*shown)) for name in shown} == expected


def test_plain_distillation_by_another_name_is_the_reference():
    shown = {"first": METHODS["bss"], "warm": METHODS["hinton"], "cold": METHODS["hinton"]}
    assert [reference_of(name, shown) for name in shown] == ["warm", None, "warm"]


def test_differences_have_welch_standard_errors():
    generator = np.random.default_rng(0)
    for _ in range(200):
        n, m = generator.integers(2, 9, 2)
        ours, theirs = generator.random(n), generator.random(m)
        students = {("s", "hinton"): runs(*theirs), ("s", "bss"): runs(*ours)}
        (verdict,) = verdicts(students, some("hinton", "bss"))
        error = np.sqrt(np.var(ours, ddof=1) / n + np.var(theirs, ddof=1) / m)
        assert verdict.difference.value == pytest.approx(ours.mean() - theirs.mean(), abs=1e-12)
        assert verdict.difference.error == pytest.approx(error, rel=1e-9)
        assert verdict.difference.is_clear == (abs(ours.mean() - theirs.mean()) > 2 * error)
        assert verdict.text == f"{100 * (ours.mean() - theirs.mean()):+.1f} ({100 * error:.1f})"


def test_the_sentence_of_a_comparison_by_hand():
    students = {
        ("net", "original"): runs(0.80, 0.82),  # mean 81, standard deviation 1.41, standard error 1
        ("net", "hinton"): runs(0.90, 0.90),
        ("net", "bss"): runs(0.91, 0.93),
    }
    assert finding(students, some("original", "hinton", "bss"), "digits") == [
        "net on the test split of digits, n = 2 seeds of each method, beside hinton (90.0 ± 0.0 %): original is 9.0 "
        "points less accurate (standard error 1.0); not to be told apart: bss (+2.0, standard error 1.0)."
    ]


def test_no_claim_is_made_within_two_standard_errors():
    generator = np.random.default_rng(1)
    shown = some("hinton", "original", "bss", "hinton_online", "bss_online")
    claimed = 0
    for _ in range(200):
        seeds = generator.integers(1, 7)
        means, scale = 0.7 + 0.02 * generator.random(len(shown)), 10 ** generator.uniform(-4, -1.5)
        values = {name: mean + scale * generator.normal(size=seeds) for name, mean in zip(shown, means, strict=True)}
        students = {("net", name): runs(*accuracies) for name, accuracies in values.items()}
        (sentence,) = finding(students, shown, "digits")
        assert all(name in sentence for name in shown)
        claims = re.findall(r"(\w+) is ([\d.]+) points (more|less) accurate", sentence)
        claimed += len(claims)
        for name, points, more in claims:
            reference = "hinton_online" if name == "bss_online" else "hinton"
            ours, theirs = values[name], values[reference]
            error = np.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / seeds)
            assert abs(ours.mean() - theirs.mean()) > 2 * error
            assert (more == "more") == (ours.mean() > theirs.mean())
            assert float(points) == pytest.approx(100 * abs(ours.mean() - theirs.mean()), abs=0.0501)
        assert seeds > 1 or "with one seed no difference is claimed" in sentence
        assert seeds > 1 or not claims
    assert claimed > 50


def test_seeds_that_agree_to_the_last_digit_are_no_claim_of_a_difference():
    students = {("net", "hinton"): runs(0.9, 0.9), ("net", "bss"): runs(0.9, 0.9)}
    (sentence,) = finding(students, some("hinton", "bss"), "digits")
    assert "not to be told apart: bss (+0.0, standard error 0.0)" in sentence


def test_the_sentence_of_one_method_states_it():
    assert finding({("net", "bss"): runs(0.5)}, some("bss"), "mnist") == [
        "net on the test split of mnist, n = 1 seed of each method: bss (50.0 %)."
    ]


def test_every_student_has_its_own_sentence_and_reference():
    students = {
        ("small", "hinton"): runs(0.5, 0.52),
        ("small", "bss"): runs(0.7, 0.72),
        ("large", "hinton"): runs(0.9, 0.92),
        ("large", "bss"): runs(0.8, 0.82),
    }
    small, large = finding(students, some("hinton", "bss"), "digits")
    assert small.startswith("small on")
    assert "beside hinton (51.0 ± 1.4 %): bss is 20.0 points more accurate" in small
    assert large.startswith("large on")
    assert "beside hinton (91.0 ± 1.4 %): bss is 10.0 points less accurate" in large


def test_a_method_that_is_compared_with_none_is_named():
    students = {("net", name): runs(0.9, 0.91) for name in ("original", "hinton", "hinton_online")}
    (sentence,) = finding(students, some("original", "hinton", "hinton_online"), "digits")
    assert sentence.endswith("; compared with none: hinton_online (90.5 ± 0.7 %).")


def test_tables_of_runs_are_read_back_by_csv():
    students = {("net", "a.b"): student(record(0, 0.123456789), record(3, 1.0, 0.25))}
    rows = list(csv.DictReader(io.StringIO(seeds_csv(students))))
    assert [(row["student"], row["method"], row["seed"]) for row in rows] == [("net", "a.b", "0"), ("net", "a.b", "3")]
    assert [float(row["accuracy"]) for row in rows] == pytest.approx([0.123456789, 1.0], abs=1e-6)
    assert [row["mag_sim_common"] for row in rows] == ["", "0.25"]


def test_curves_are_read_back(tmp_path):
    curve = [{"seed": seed, "epoch": epoch, "validation_accuracy": 0.25 * epoch} for seed in (0, 1) for epoch in (1, 2)]
    (tmp_path / "curves.csv").write_text(curves_csv({("net", "bss"): curve, ("net", "hinton"): []}))
    assert read_curves(tmp_path / "curves.csv") == curve


def test_metrics_are_the_means_of_the_summary_alone():
    students = {("net", "original"): runs(0.5, 0.6), ("net", "bss"): student(record(0, 0.75, 0.25))}
    assert metrics(summarise("toys", TEACHER, students)) == {
        "teacher": {"accuracy": 0.9877, "balanced_accuracy": 0.9, "macro_f1": 0.8},
        "net": {
            "original": {"accuracy": 0.55, "balanced_accuracy": 0.275, "macro_f1": 0.1375},
            "bss": {
                "accuracy": 0.75,
                "balanced_accuracy": 0.375,
                "macro_f1": 0.1875,
                "MagSim": 0.25,
                "AngSim": 0.25,
            },
        },
        "costs": {"teacher": TEACHER.costs.model_dump(), "net": COSTS.model_dump()},
    }


def test_the_table_of_quality_and_cost_begins_with_the_teacher():
    students = {("net", "original"): runs(0.5, 0.75), ("net", "bss"): runs(0.5)}
    plain = ["Network", "Method", "Accuracy, %", "Balanced accuracy, %", "Macro F1, %"]
    plain += ["Parameters", "Multiply-adds", "File, bytes"]
    of_teacher = ["big", "teacher", "98.8", "90.0", "80.0", "3,000", "1", "2"]
    of_students = [
        ["net", "original", "62.5 ± 17.7", "31.2 ± 8.8", "15.6 ± 4.4", "1,000", "20,000", "4,321"],
        ["net", "bss", "50.0", "25.0", "12.5", "1,000", "20,000", "4,321"],
    ]
    assert quality_cells("big", TEACHER, students) == (plain, [of_teacher, *of_students])
    networks = {"big": NetworkLatency(image=0.0123, batch=1.5), "net": NetworkLatency(image=0.00025, batch=0.002)}
    latency = Latency(device="a CPU", threads=2, image_shape=(1, 8, 8), networks=networks)
    header, rows = quality_cells("big", TEACHER, students, latency)
    assert header[8:] == ["One image, ms", "64 images, ms"]
    assert [row[8:] for row in rows] == [["12.3", "1500"], ["0.25", "2"], ["0.25", "2"]]


def test_csv_text_quotes_what_would_end_a_field():
    text = csv_text(("name", "value"), [{"name": 'a,"b"\nc', "value": None}])
    assert list(csv.DictReader(io.StringIO(text))) == [{"name": 'a,"b"\nc', "value": ""}]


@pytest.mark.parametrize("content", [b"", b"seed,epoch\n1,2\n", b"seed,epoch,validation_accuracy\n0,1,\n"])
def test_curves_without_a_validation_split_are_none(tmp_path, content):
    (tmp_path / "curves.csv").write_bytes(content)
    assert read_curves(tmp_path / "curves.csv") == []


@pytest.mark.parametrize(
    "content",
    [b"epoch,validation_accuracy\n1,0.5\n", b"seed,epoch,validation_accuracy\n0,x,0.5\n", b"\xff\xfe\x00", None],
)
def test_damaged_curves_are_named(tmp_path, content):
    if content is not None:
        (tmp_path / "curves.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"curves\.csv: cannot be read .*make it with: python -m stages\.student --all"):
        read_curves(tmp_path / "curves.csv")


def test_records_of_stages_are_read_back_and_damaged_ones_left_out(tmp_path):
    record_run(tmp_path, "a", RunRecord(seconds=1.5, said="wrote"))
    record_run(tmp_path, "b", RunRecord(seconds=2.5, said=HOSTILE))
    for number, content in enumerate((b"", b"{}", b"[1]", b"\xff\xfe", b'{"seconds": 1')):
        (tmp_path / f"{number}.json").write_bytes(content)
    found = read_records(tmp_path)
    assert list(found) == ["a", "b"]
    assert found["b"] == RunRecord(seconds=2.5, said=HOSTILE)


# Decision maps


def points_of(seed, shape=(3, 4, 5)):
    return random_images(seed, 3, shape)


DEGENERATE = {
    "independent": lambda a, b, c: (a, b, c),
    "on a line": lambda a, b, c: (a, b, a + 0.5 * (b - a)),
    "second is the image": lambda a, b, c: (a, b, a),
    "first is the image": lambda a, b, c: (a, a, c),
    "both samples the same": lambda a, b, c: (a, b, b),
    "all the same": lambda a, b, c: (a, a, a),
    "close together": lambda a, b, c: (a, a + 1e-4 * b, a + 1e-4 * c),
}


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("seed", range(5))
def test_planes_are_orthonormal_and_hold_their_points_well_inside(kind, seed):
    points = torch.stack(DEGENERATE[kind](*points_of(seed)))
    plane = plane_through(*points)
    axes = np.stack([plane.across.double().flatten().numpy(), plane.up.double().flatten().numpy()])
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-6)
    places = plane.coordinates(points)
    again = points[0].double().flatten().numpy() + places @ axes
    np.testing.assert_allclose(again, points.flatten(1).double().numpy(), atol=1e-6)
    assert plane.side > 0
    relative = (places - [plane.left, plane.bottom]) / plane.side
    assert (relative > 0.2).all()
    assert (relative < 0.8).all()


@pytest.mark.parametrize("plane", [plane_through(*points_of(1)), unit_square((1, 1, 2)), unit_square((2, 1, 1))])
def test_coordinates_are_the_inverse_of_points(plane):
    number = 5
    steps = np.linspace(0, plane.side, number)
    b, a = np.meshgrid(plane.bottom + steps, plane.left + steps, indexing="ij")  # row by row from the bottom
    expected = np.stack([a.ravel(), b.ravel()], 1)
    np.testing.assert_allclose(plane.coordinates(plane.points(number)), expected, atol=1e-5)


def middles(plane):
    """The coordinates (side, 2) of the middles of a picture's pixels along both axes."""
    side = decision_map.SIDE
    steps = (np.arange(side) + 0.5) / side * plane.side
    return plane.left + steps, plane.bottom + steps


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 72, 72)])  # of the large one, fewer points are asked
def test_logits_of_a_linear_network_are_exact_everywhere(shape):
    plane = plane_through(*torch.rand(3, *shape, generator=torch.Generator().manual_seed(2)))
    model = random_linear_classifier(3, 5, shape, torch.float32)
    logits = decision_map.logits_on(model, plane, CPU)
    a, b = middles(plane)
    weight = model.network[1].weight.double()
    start, across, up = ((weight @ each.double().flatten()).numpy() for each in plane[:3])
    start = start + model.network[1].bias.double().numpy()
    expected = start[:, None, None] + across[:, None, None] * a[None, None, :] + up[:, None, None] * b[None, :, None]
    np.testing.assert_allclose(logits, expected, atol=1e-4 * max(1, np.abs(expected).max() / 10))


def test_splines_go_through_the_points_that_were_asked():
    class Bumps(torch.nn.Module):
        def forward(self, x):
            return torch.stack([torch.sin(3 * x.flatten(1)[:, 0]), torch.cos(2 * x.flatten(1)[:, 1])], 1)

    plane = unit_square((1, 1, 2))
    logits = decision_map.logits_on(Bumps(), plane, CPU)
    a, b = middles(plane)
    expected = np.stack(np.broadcast_arrays(np.sin(3 * a)[None, :], np.cos(2 * b)[:, None]))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_the_margin_is_the_best_logit_less_the_second_best():
    logits = np.random.default_rng(0).normal(size=(7, 6, 6)).astype(np.float32)
    ordered = np.sort(logits, 0)
    np.testing.assert_array_equal(decision_map.margin_on(logits), ordered[-1] - ordered[-2])


def drawn_lines(classes, seed):
    """The vertices of the boundaries that are drawn of a linear network on a plane: (plane, model, [(V, 2)])."""
    plane = plane_through(*points_of(seed))
    model = random_linear_classifier(seed, classes, (3, 4, 5), torch.float32)
    logits = decision_map.logits_on(model, plane, CPU)
    extent = (plane.left, plane.left + plane.side, plane.bottom, plane.bottom + plane.side)
    axes, lines = Figure().subplots(), []
    for field in decision_map._boundaries(logits):
        drawn = axes.contour(field, [0], origin="lower", extent=extent)
        lines += [segment for segments in drawn.allsegs for segment in segments if len(segment) > 1]
    return plane, model, logits, lines


@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("seed", range(3))
def test_boundaries_are_drawn_where_a_linear_network_has_them(classes, seed):
    plane, model, logits, lines = drawn_lines(classes, seed)
    pixel = plane.side / logits.shape[1]
    weight = model.network[1].weight.double()
    axes = torch.stack([plane.across.flatten(), plane.up.flatten()], 1).double()
    slopes = (weight @ axes).numpy()
    start = (weight @ plane.origin.double().flatten()).numpy() + model.network[1].bias.double().numpy()
    for vertices in lines:
        values = vertices @ slopes.T + start
        order = np.argsort(values, 1)
        (first, second), row = order[:, :-3:-1].T, np.arange(len(values))
        distance = (values[row, first] - values[row, second]) / np.linalg.norm(slopes[first] - slopes[second], axis=1)
        assert distance.max() < pixel
        assert np.quantile(distance, 0.9) < 0.02 * pixel  # near junctions of three classes, up to a pixel is missing
    vertices = np.concatenate([*lines, np.zeros((0, 2))])
    regions = logits.argmax(0)
    rows, columns = np.nonzero(regions[:, 1:] != regions[:, :-1])
    found = np.stack([plane.left + (columns + 1) * pixel, plane.bottom + (rows + 0.5) * pixel], 1)
    for place in found:
        assert np.hypot(*(vertices - place).T).min() < 3 * pixel  # no boundary is left out


@pytest.mark.parametrize("classes", [3, 12])
def test_no_boundary_is_drawn_twice(classes):
    for seed in range(3):
        plane, _, logits, lines = drawn_lines(classes, seed)
        regions = logits.argmax(0)
        pixel = plane.side / logits.shape[1]
        drawn = sum(np.hypot(*np.diff(line, axis=0).T).sum() for line in lines)
        steps = np.count_nonzero(np.diff(regions, axis=0)), np.count_nonzero(np.diff(regions, axis=1))
        assert drawn <= sum(steps) * pixel * 1.02 + 6 * pixel  # no straight line is longer than its staircase
        assert drawn >= max(steps) * pixel * 0.95 - 12 * pixel


ODD_NAMES = ("$\\frac{$", "^_{}", "a & b <c>", "Größe", "%s {0}", "", "line\nline", HOSTILE)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [2, 3, 12, 25])
def test_maps_of_any_number_of_classes_and_any_names_are_pictures(classes):
    plane = plane_through(*points_of(4))
    places = plane.coordinates(points_of(4))
    scene = Scene(plane, places[1:], [places[:2]], places[:1], np.array([classes - 1]))
    logits = decision_map.logits_on(random_linear_classifier(0, classes, (3, 4, 5), torch.float32), plane, CPU)
    names = [ODD_NAMES[number % len(ODD_NAMES)] for number in range(classes)]
    for teacher in (None, logits[::-1].copy()):
        content = decision_map.map_png(scene, logits, names, teacher)
        assert Image.open(io.BytesIO(content)).size == (600, 600)
    assert decision_map.map_png(scene, logits, names, None) == decision_map.map_png(scene, logits, names, None)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 5.0, np.nan])
def test_maps_of_one_class_alone_or_of_no_numbers_are_pictures(value):
    logits = np.zeros((3, 60, 60), np.float32)
    logits[1] += value
    plane = unit_square((1, 1, 2))
    scene = Scene(plane, np.zeros((0, 2)), [], np.zeros((0, 2)), np.zeros(0, np.int64))
    assert not list(decision_map._boundaries(logits))
    assert decision_map.map_png(scene, logits, CLASS_NAMES[:3], logits).startswith(b"\x89PNG")


def test_agreement_is_the_share_of_equal_classes():
    ours, theirs = np.random.default_rng(3).normal(size=(2, 4, 9, 9)).astype(np.float32)
    same = sum(np.argmax(ours[:, i, j]) == np.argmax(theirs[:, i, j]) for i in range(9) for j in range(9)) / 81
    assert decision_map.agreement_on(ours, theirs) == pytest.approx(same)
    assert decision_map.agreement_on(ours, ours) == 1


def test_paths_go_from_the_image_to_a_sample_on_the_boundary():
    teacher, splits = tiny_teacher(), tiny_splits()
    image = torch.from_numpy(splits["train"].images[0]).float() / 255
    base = int(splits["train"].labels[0])
    assert int(teacher(image[None]).argmax()) == base
    for target in {*range(4)} - {base}:
        path = decision_map.search_path(teacher, image, base, target)
        torch.testing.assert_close(path[0], image)
        best, second = teacher(path[-1:]).topk(2).values[0].tolist()
        assert np.tanh((best - second) / 2) <= 0.02
        assert {*teacher(path[-1:]).topk(2).indices[0].tolist()} == {base, target}


# The gallery


def converged(shards, label):
    """All converged first samples of a class in view 0, by row: brute force over rows."""
    rows = [(number, shards[number]) for number in range(shards.manifest.rows)]
    return [
        (float(row["distance"][0]), number)
        for number, row in rows
        if int(row["label"]) == label and int(row["status"][0]) == Status.CONVERGED
    ]


@pytest.fixture(scope="module", params=["gray", "rgb", "no images"])
def dataset(request, tmp_path_factory):
    """(shards, train): K = 2 targets; the teacher is always right."""
    shape = (3, 8, 8) if request.param == "rgb" else (1, 8, 8)
    teacher = tiny_resnet(7, 4, shape)
    train = random_prepared(8, 60, shape, 4, teacher)
    attack = attack_parameters(embed_images=request.param != "no images", targets=2, views=2)
    folder = tmp_path_factory.mktemp("gallery")
    return BoundaryShards(make_shards(folder, train, teacher, attack)), train, teacher


def test_examples_are_of_median_distance(dataset):
    shards, train, _ = dataset
    examples = typical_examples(shards, train, 12)
    expected = {label: sorted(converged(shards, label)) for label in range(4)}
    assert [example.base for example in examples] == [label for label, found in expected.items() if found]
    assert len(examples) >= 3
    for example in examples:
        found = expected[example.base]
        distance, _ = found[len(found) // 2]
        assert example.distance == distance
        below = sum(each < distance for each, _ in found)
        assert below <= len(found) / 2
        assert float((example.sample - example.image).norm()) == pytest.approx(distance, rel=0.02)  # delta is int8
        assert 0 <= example.probability_margin <= 0.02
    assert [each.base for each in typical_examples(shards, train, 2)] == [each.base for each in examples[:2]]


def test_samples_are_on_the_boundary_of_base_and_target(dataset):
    shards, train, teacher = dataset
    for example in typical_examples(shards, train, 12):
        logits = teacher(example.sample[None])[0]
        assert {*logits.topk(2).indices.tolist()} == {example.base, example.target}
        torch.testing.assert_close(teacher(example.image[None])[0], example.logits, atol=2e-2, rtol=2e-2)
        assert int(example.logits.argmax()) == example.base


def test_images_that_are_not_embedded_are_made_again(tmp_path):
    teacher = tiny_resnet(7)
    train = random_prepared(8, 40, classes=4, model=teacher)
    found = []
    for embedded in (True, False):
        folder = tmp_path / str(embedded)
        folder.mkdir()
        attack = attack_parameters(embed_images=embedded)
        shards = BoundaryShards(make_shards(folder, train, teacher, attack))
        found.append([list(pictures(example)) for example in typical_examples(shards, train, 12)])
    assert found[0] == found[1]
    assert found[0]


def test_a_class_without_converged_samples_is_left_out(tmp_path):
    teacher = tiny_resnet(7)
    right = random_prepared(8, 40, classes=4, model=teacher)
    labels = np.where(right.labels == 0, 1, right.labels)
    labels[right.labels == 3] = 0  # no image is left of class 0 that the teacher has right
    train = in_memory(right.images, labels, right.class_names, right.mean, right.std)
    shards = BoundaryShards(make_shards(tmp_path, train, teacher, attack_parameters()))
    expected = [label for label in range(4) if converged(shards, label)]
    assert [each.base for each in typical_examples(shards, train, 12)] == expected
    assert 0 in labels
    assert 0 not in expected


def test_without_converged_samples_there_are_no_examples_and_no_scenes(tmp_path):
    teacher = tiny_resnet(7)
    train = random_prepared(8, 40, classes=4, model=teacher)
    made = make_shards(tmp_path, train, teacher, attack_parameters(), name="random", tolerance=1e-9)
    shards = BoundaryShards(made)
    assert not shards.manifest.totals.statuses["converged"]
    examples = typical_examples(shards, train, 12)
    assert examples == []
    assert list(scenes_of(shards, train, teacher, examples)) == []


def test_scenes_are_planes_through_an_image_and_two_samples(dataset):
    shards, train, teacher = dataset
    examples = typical_examples(shards, train, 12)
    for _, scene in scenes_of(shards, train, teacher, examples):
        images = torch.stack(
            [scene.plane.origin + a * scene.plane.across + b * scene.plane.up for a, b in scene.samples]
        )
        for logits in teacher(images.float()):
            best, second = logits.topk(2).values.tolist()
            assert np.tanh((best - second) / 2) <= 0.021
            assert int(scene.labels[0]) in logits.topk(2).indices.tolist()


def test_the_scene_of_a_plane_of_inputs_has_all_points_where_their_pixels_say(tmp_path):
    shape = (1, 1, 2)
    architecture = Architecture("mlp2w32", 3, shape, (0.5,), (0.3,))
    teacher = untrained(architecture, random_images(0, 256, shape), seed=1)
    images = np.random.default_rng(2).integers(0, 256, (80, *shape), np.uint8)
    labels = teacher(torch.from_numpy(images).float() / 255).argmax(1).numpy()
    train = in_memory(images, labels, ("a", "b", "c"), (0.5,), (0.3,))
    made = make_shards(tmp_path, train, teacher, attack_parameters(), view_parameters(padding=0, flip=False))
    ((_, scene),) = scenes_of(BoundaryShards(made), train, teacher, [])
    np.testing.assert_allclose(scene.images, images.reshape(-1, 2) / 255, atol=1e-6)
    np.testing.assert_array_equal(scene.labels, labels)
    assert 0 < len(scene.samples) <= 80
    logits = teacher(torch.from_numpy(scene.samples).float().reshape(-1, *shape)).sort(1).values
    assert torch.tanh((logits[:, -1] - logits[:, -2]) / 2).max() <= 0.02
    for path in scene.paths:
        assert np.abs(scene.images - path[0]).max(1).min() < 1e-6
        assert np.linalg.norm(scene.samples - path[-1], axis=1).min() < 0.02  # stored ones are rounded


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_pixel(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (channels, 5, 7), np.uint8)
    image = np.asarray(Image.open(io.BytesIO(png(torch.from_numpy(pixels).float() / 255))))
    np.testing.assert_array_equal(image.reshape(5, 7, channels), pixels.transpose(1, 2, 0))


def test_the_amplified_perturbation_reaches_black_or_white_and_zero_is_grey(dataset):
    shards, train, _ = dataset
    example = typical_examples(shards, train, 1)[0]
    perturbation = np.asarray(Image.open(io.BytesIO(list(pictures(example))[2])))
    assert perturbation.min() == 0 or perturbation.max() == 255
    still = dataclasses.replace(example, sample=example.image)
    assert amplification(still) == 1
    assert {*np.asarray(Image.open(io.BytesIO(list(pictures(still))[2]))).ravel()} == {128}


# Charts


def specs_of(spec):
    """The layers of a chart, or itself."""
    return spec.get("layer", [spec])


def rows_of(spec, layer):
    """The records of a layer."""
    data = layer.get("data") or spec["data"]
    return data["values"] if "values" in data else spec["datasets"][data["name"]]


def checked(spec):
    """A chart that is valid Vega-Lite, draws without warnings, and is plain JSON; returns its drawing as SVG."""
    alt.Chart.from_dict(spec)
    assert json.loads(json.dumps(spec, allow_nan=False)) == spec
    return vl_convert.vegalite_to_svg(spec | {"width": 300})


def drawn(svg, kind):
    """How many marks of a kind are in a drawing."""
    return svg.count(f'aria-roledescription="{kind}"')


def table(methods, seeds, missing=()):
    generator = np.random.default_rng(len(methods) * 10 + seeds)
    return [
        {"method": method, "accuracy": float(generator.random())}
        | {"seed": seed, "mag_sim_common": None if method in missing else float(generator.random())}
        for method in methods
        for seed in range(seeds)
    ]


TWELVE = [f"method_{number}" for number in range(12)]


@pytest.mark.parametrize("methods", [["bss"], ["original", "hinton", "bss"], TWELVE], ids=len)
@pytest.mark.parametrize("seeds", [1, 5])
def test_charts_of_accuracy_draw_every_run_and_the_spread_of_each_method(methods, seeds):
    rows = table(methods, seeds)
    spec = charts.accuracy_chart(rows, methods)
    svg = checked(spec)
    assert drawn(svg, "circle") == len(rows)
    *_, spreads, dots = (rows_of(spec, layer) for layer in specs_of(spec))
    assert [(row["method"], row["seed"], row["accuracy"]) for row in dots] == [
        (row["method"], row["seed"], row["accuracy"]) for row in rows
    ]
    for spread in spreads:
        values = [row["accuracy"] for row in rows if row["method"] == spread["method"]]
        deviation = np.std(values, ddof=1) if seeds > 1 else 0
        assert spread["mean"] == pytest.approx(np.mean(values))
        assert [spread["low"], spread["high"]] == pytest.approx(
            [np.mean(values) - deviation, np.mean(values) + deviation]
        )
    assert [spread["method"] for spread in spreads] == methods


def test_methods_without_a_similarity_keep_their_place_and_the_others_their_runs():
    methods = ["original", "hinton", "bss"]
    rows = table(methods, 3, missing=("hinton",))
    spec = charts.similarity_chart(rows, methods, "mag_sim_common", "MagSim")
    svg = checked(spec)
    assert drawn(svg, "circle") == 6
    assert "NaN" not in svg
    assert all(f">{method}<" in svg for method in methods)


def test_methods_have_different_colours_the_same_in_every_chart():
    methods = ["original", "hinton", "bss", "at", "dkd"]
    rows = table(methods, 2)
    curves = [{"method": row["method"], "seed": 0, "epoch": 1, "validation_accuracy": 0.5} for row in rows]
    scales = [
        specs_of(spec)[-1]["encoding"]["color"]["scale"]
        for spec in (charts.accuracy_chart(rows, methods), charts.curves_chart(curves, methods))
    ]
    assert scales[0] == scales[1]
    assert len(set(scales[0]["range"])) == len(methods)


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("methods", [["bss"], TWELVE], ids=len)
def test_learning_curves_are_means_and_ranges_over_seeds(epochs, methods):
    generator = np.random.default_rng(epochs)
    rows = [
        {"method": method, "seed": seed, "epoch": epoch, "validation_accuracy": float(generator.random())}
        for method in methods
        for seed in range(3)
        for epoch in range(1, epochs + 1)
    ]
    spec = charts.curves_chart(rows, methods)
    svg = checked(spec)
    assert drawn(svg, "point") + drawn(svg, "circle") >= len(methods) * epochs
    kept = rows_of(spec, specs_of(spec)[-1])
    assert len(kept) == len(methods) * epochs
    for row in kept:
        values = [
            each["validation_accuracy"]
            for each in rows
            if (each["method"], each["epoch"]) == (row["method"], row["epoch"])
        ]
        assert [row["mean"], row["lowest"], row["highest"]] == pytest.approx(
            [np.mean(values), min(values), max(values)]
        )


def test_the_chart_of_published_views_shows_every_cell():
    results = read_results(ROOT / "docs/results/views.json")
    for student in {cell.labels["student"] for cell in results.cells}:
        spec = charts.views_chart(results, student)
        checked(spec)
        shown = {(row["method"], row["views"]): row for layer in specs_of(spec) for row in rows_of(spec, layer)}
        for cell in results.cells:
            if cell.labels["student"] == student:
                number = float(cell.labels["views"]) if cell.labels["views"].isdigit() else None
                row = shown.pop((cell.labels["method"], number))
                assert row["mean"] == pytest.approx(np.mean([[run.accuracy for run in draw] for draw in cell.runs]))
                assert row["n"] == sum(map(len, cell.runs))
        assert not shown


def test_the_chart_of_one_number_of_views_is_drawn():
    results = read_results(ROOT / "docs/results/views.json")
    cells = [cell for cell in results.cells if cell.labels["views"] == "8"]
    svg = checked(charts.views_chart(results.model_copy(update={"cells": cells}), "resnet8w2"))
    assert "NaN" not in svg
    assert drawn(svg, "point") + drawn(svg, "circle") >= len(cells)


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        (np.random.default_rng(0).exponential(1, 1000), 0.0),
        (np.random.default_rng(1).random(50) * 0.01, 0.02),
        (np.zeros(7), 0.0),
        (np.array([3.0]), 0.0),
        (np.array([0.0, 1e-12]), 0.0),
    ],
)
def test_histograms_count_every_value_once(values, limit):
    rows = charts.histogram(values, limit)
    assert sum(row["samples"] for row in rows) == len(values)
    edges = [rows[0]["from"], *(row["to"] for row in rows)]
    assert [row["from"] for row in rows[1:]] == edges[1:-1]
    assert edges[0] == 0
    assert edges[-1] >= max(values.max(), limit)
    np.testing.assert_array_equal([row["samples"] for row in rows], np.histogram(values, edges)[0])
    svg = checked(charts.histogram_chart(rows, "distance", limit or None))
    assert drawn(svg, "bar") == len(rows)
    assert svg.count("stroke-dasharray") == bool(limit)


def test_a_histogram_of_nothing_has_no_bins():
    assert charts.histogram(np.zeros(0)) == []


# Class by class


def confusions_of(classes, seed=0, runs=3):
    """Confusion matrices of a teacher and a student by NumPy, of a split that lacks class 1."""
    generator = np.random.default_rng(seed)
    labels = generator.choice([number for number in range(classes) if number != 1], 200)
    found = {}
    for name, count in (("teacher", 1), ("net", runs)):
        found[name] = np.zeros((count, classes, classes), int)
        for matrix in found[name]:
            predicted = np.where(generator.random(200) < 0.7, labels, generator.integers(0, classes, 200))
            np.add.at(matrix, (labels, predicted), 1)
    return found, labels


def test_the_table_of_classes_has_counts_and_the_spread_over_seeds():
    found, labels = confusions_of(4)
    table = class_table(found, CLASSES)
    assert table.header == ["Class", "Images", "teacher", "net"]
    assert [row[0] for row in table.rows] == list(CLASSES)
    assert table.rows[1][1:] == ["0", "-", "-"]
    for number in (0, 2, 3):
        count = (labels == number).sum()
        shares = 100 * found["net"][:, number, number] / count
        expected = [str(count), f"{100 * found['teacher'][0, number, number] / count:.1f}"]
        assert table.rows[number][1:] == [*expected, f"{shares.mean():.1f} ± {shares.std(ddof=1):.1f}"]


def test_a_class_accuracy_over_one_seed_has_no_deviation():
    found, _ = confusions_of(4, runs=1)
    assert all("±" not in cell for row in class_table(found, CLASSES).rows for cell in row)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [2, 3, 20, 21, 100])
def test_confusion_matrices_are_drawn_for_any_number_of_classes_and_any_names(classes):
    names = [(*CLASSES, "Größe")[number % 5] for number in range(classes)]
    found, _ = confusions_of(classes)
    (row,) = confusion_pictures(found, names).rows
    assert [picture.text for picture in row.pictures] == ["teacher", "net"]
    for picture in row.pictures:
        drawn = Image.open(io.BytesIO(picture.png))
        assert 300 < drawn.width == drawn.height < 2000


def texts_of(monkeypatch, matrices, names):
    """The texts in the cells of the confusion matrix of the last network, by (row, column)."""
    figures = []
    monkeypatch.setattr("pipeline.report.classes.png_of", lambda figure: figures.append(figure) or b"")
    confusion_pictures(matrices, names)
    (axes,) = figures[-1].axes
    return {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}, axes


def test_cells_are_means_over_seeds_in_per_cent_of_the_row(monkeypatch):
    first, second = np.array([[8, 2], [0, 0]]), np.array([[4, 6], [0, 0]])
    texts, axes = texts_of(monkeypatch, {"net": np.stack([first, second])}, ["a", "b"])
    assert texts == {(0, 0): "60", (0, 1): "40"}  # class b has no images
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.6, 0.4], [0, 0]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    texts, _ = texts_of(monkeypatch, {"net": np.array([[[499, 1], [0, 500]]])}, ["a", "b"])
    assert texts == {(0, 0): "100", (0, 1): "<1", (1, 1): "100"}


def test_beyond_twenty_classes_there_are_no_numbers(monkeypatch):
    for classes, numbers in ((20, True), (21, False)):
        found, _ = confusions_of(classes)
        texts, axes = texts_of(monkeypatch, found, [f"c{number}" for number in range(classes)])
        assert bool(texts) == numbers
        assert ("c0" in [label.get_text() for label in axes.get_yticklabels()]) == numbers


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 20), (3, 224, 224), (1, 100, 300), (1, 1, 2)])
def test_thumbnails_keep_small_images_and_shrink_large_ones(shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    image[:, : shape[1] // 2] = 200
    drawn = Image.open(io.BytesIO(thumbnail(image)))
    channels, height, width = shape
    scale = min(1, THUMBNAIL / max(height, width))
    assert drawn.size == (round(width * scale), round(height * scale))
    assert drawn.mode == ("L" if channels == 1 else "RGB")
    values = np.asarray(drawn).reshape(*drawn.size[::-1], channels)
    if scale == 1:
        assert np.array_equal(values.transpose(2, 0, 1), image)
    else:
        assert np.abs(values[: len(values) // 3].astype(int) - 200).max() <= 3


# The page


CHARTS = ("latency", "accuracy", "views", "curves", "similarity", "dataset")
PICTURES, TABLES = ("confusion", "disagreements", "gallery", "maps"), ("table", "quality", "classes")
SECTIONS = ("finding", "table", "quality", "accuracy", "views", "curves", "classes", "disagreements", "similarity")
SECTIONS += ("dataset", "gallery", "maps", "facts")
MOST_BYTES = 8_000_000


class Parsed(HTMLParser):
    """Elements of a page: (tag, attributes), the text between tags, rows of tables, and the text of each script."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.scripts, self.rows = [], "", [], []
        self.inside = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += data
            if self.inside in ("td", "th"):
                self.rows[-1][-1] += data

    @property
    def fetched(self):
        """What a browser would load: the values of attributes that name something, and of url(...) in styles."""
        named = [
            value
            for _, attributes in self.tags
            for name, value in attributes.items()
            if name in ("src", "href", "srcset", "data", "action", "poster", "background")
        ]
        styles = [attributes.get("style") or "" for _, attributes in self.tags]
        return named + re.findall(r"url\(['\"]?([^)'\"]*)", " ".join(styles))


def content(word, **changes):
    """Content of a page in which a word stands wherever text can."""
    grey = png(torch.full((1, 4, 4), 0.5))
    rows = [{"method": word, "seed": 0, "accuracy": 0.5}]
    chart = Chart(word, charts.accuracy_chart(rows, [word]))
    row = Row(word, [Picture(grey, word)], [word])
    values = {"title": word, "compared": word, "finding": [word], "facts": {word: {word: word}}}
    values |= {name: Charts(charts=[chart], note=word) for name in CHARTS}
    values |= {name: Pictures(rows=[row], note=word) for name in PICTURES}
    values |= {name: Table(header=[word] * 5, rows=[[word] * 5], note=word) for name in TABLES}
    return Content(**(values | changes))


@pytest.mark.parametrize("word", [HOSTILE, "\u2028 ünï \U0001f98a", "plain", "*"])
def test_whatever_stands_on_the_page_is_text(word):
    parsed, plain = Parsed(render(content(word))), Parsed(render(content("word")))
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in plain.tags]
    assert [tag for tag, _ in parsed.tags].count("script") == 6 + 2
    assert parsed.text.count(word) >= 20 or word == "*"
    specs = [json.loads(script) for script in parsed.scripts if script.startswith("{")]
    assert len(specs) == 6
    assert all(word in json.dumps(spec, ensure_ascii=False).replace('\\"', '"') for spec in specs)
    assert all(each.startswith(("data:", "#")) for each in parsed.fetched)
    assert word in dict(parsed.tags)["img"]["alt"]


def test_a_page_without_content_has_its_sections_and_notes():
    nothing = {name: Charts(charts=[], note="word") for name in CHARTS}
    nothing |= {name: Pictures(rows=[], note="word") for name in PICTURES}
    nothing |= {name: Table(header=[], rows=[], note="word") for name in TABLES}
    page = Parsed(render(content("word", finding=[], **nothing, facts={})))
    assert tuple(each["id"] for tag, each in page.tags if "id" in each) == SECTIONS
    assert page.text.count("word") >= 8 + 4


EPOCHS = 20  # so that students know enough to have pairs in common


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder after all stages, of two students by three methods and two seeds; classes have hostile names."""
    directory = tmp_path_factory.mktemp("report")
    methods, students = ["original", "hinton", "bss"], ["resnet8w2", "mlp1w16"]
    make_project(directory, {"methods": methods, "students": students, "training.epochs": EPOCHS})
    for name, split in tiny_splits().items():
        named = in_memory(split.images, split.labels, CLASSES, split.mean, split.std)
        write_prepared(directory / f"data/prepared/{name}.h5", named)
    views = ROOT / "docs/results/views.json"
    for stage in (("attack",), ("student", "--all"), ("evaluate",), ("report", "--views", str(views))):
        code, _, errors = finish(fork_stage(directory, *stage))
        assert code == 0, errors
        assert "Warning" not in errors
    return directory


@pytest.fixture(scope="module")
def page(project):
    return Parsed((project / "reports/report.html").read_text())


def test_the_page_has_every_section_in_order(page, project):
    assert tuple(each["id"] for tag, each in page.tags if each.get("id") in SECTIONS) == SECTIONS
    links = [each["href"] for tag, each in page.tags if tag == "a"]
    assert links == [f"#{name}" for name in SECTIONS]
    assert (project / "reports/report.html").stat().st_size < MOST_BYTES


def test_a_browser_would_fetch_nothing(page):
    assert all(each.startswith(("data:image/png;base64,", "#")) for each in page.fetched)
    (policy,) = [each["content"] for tag, each in page.tags if each.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_digests_parameters_and_versions_are_on_the_page(page, project):
    manifest = json.loads((project / "data/bss/manifest.json").read_text())
    for text in (
        manifest["fingerprint"],
        manifest["digests"]["teacher"],
        manifest["digests"]["train"],
        version("torch"),
    ):
        assert text in page.text
    for name in ("attack", "training", "teacher", "dataset", "evaluation"):
        assert f"Parameters: {name}" in page.text
    for name in ("tolerance", "bss.zero_at", "learning_rate", "training.milestones", "rows_per_shard"):
        assert name in page.text


def test_class_names_are_text_on_the_page(page):
    for name in CLASSES:
        assert f"b = {name}" in page.text or f"k = {name}" in page.text
    assert not [each for tag, each in page.tags if tag == "b"]


def test_the_table_of_the_page_is_that_of_the_file_and_the_sentence_stands_in_both(page, project):
    text = (project / "reports/table.md").read_text()
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith(("| Student", "| Network")):
            assert all(cell.strip() in page.text for cell in line.strip("| ").split("|"))
    sentences = [line for line in text.splitlines() if line.startswith(("resnet8w2 on", "mlp1w16 on"))]
    assert len(sentences) == 2
    assert all(sentence in page.text for sentence in sentences)


def test_the_quality_and_the_classes_on_the_page_are_those_of_the_weights(page, project):
    test = read_prepared(project / "data/prepared/test.h5")
    names = [f"{student}-{method}" for student in ("resnet8w2", "mlp1w16") for method in ("original", "hinton", "bss")]
    images = torch.from_numpy(test.images) / 255
    for name in names:
        balanced, shares = [], []
        for seed in range(2):
            model = load_weights(project / f"models/students/{name}/seed-{seed}.safetensors").eval()
            predicted = model(images).argmax(1).numpy()
            balanced.append(100 * balanced_accuracy_score(test.labels, predicted))
            shares.append(100 * (predicted == test.labels)[test.labels == 2].mean())
        student, method = name.split("-")
        _, row = (row for row in page.rows if row[:2] == [student, method])  # the second table
        assert row[3] == f"{np.mean(balanced):.1f} ± {np.std(balanced, ddof=1):.1f}"
        (row,) = (row for row in page.rows if row[0] == CLASSES[2])
        assert row[1] == str((test.labels == 2).sum())
        assert row[3 + names.index(name)] == f"{np.mean(shares):.1f} ± {np.std(shares, ddof=1):.1f}"


def test_the_images_on_which_networks_disagree_are_in_the_test_split(page, project):
    test = read_prepared(project / "data/prepared/test.h5")
    shown = [dict(attributes) for tag, attributes in page.tags if tag == "img"]
    shown = [each for each in shown if each["alt"].startswith("Test image, ")]
    assert 0 < len(shown) <= 16
    for each in shown:
        content = base64.b64decode(each["src"].partition(",")[2])
        image = np.asarray(Image.open(io.BytesIO(content)))[None]
        (row,) = np.nonzero((test.images == image).all((1, 2, 3)))[0]
        assert each["alt"] == f"Test image, {CLASSES[test.labels[row]]}"


def test_latency_is_shown_where_it_was_measured_for_these_images(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setattr("pipeline.evaluate.latency.MEASURED", 0.05)
    result = run_stage("latency", "--out", "measured/latency.json")
    assert result.exit_code == 0, result.output
    measured = json.loads((project / "measured/latency.json").read_text())
    assert set(measured["networks"]) == {"resnet8w2", "mlp1w16"}
    arguments = ("report", "--latency", "measured/latency.json", "--out", "measured")
    code, _, errors = finish(fork_stage(project, *arguments))
    assert code == 0, errors
    page = Parsed((project / "measured/report.html").read_text())
    _, row = (row for row in page.rows if row[:2] == ["mlp1w16", "bss"])
    assert row[8:] == [milliseconds(measured["networks"]["mlp1w16"][name]) for name in ("image", "batch")]
    (chart,) = (json.loads(each) for each in page.scripts if each.startswith("{") and '"milliseconds"' in each)
    drawn = {(each["network"], each["method"]): each for each in rows_of(chart, chart)}
    assert len(drawn) == 2 * 3 + 1
    teacher = json.loads((project / "reports/evaluation/teacher.json").read_text())
    assert drawn["resnet8w2", "teacher"]["accuracy"] == teacher["accuracy"]
    assert "was not measured" not in page.text

    for change in ({"image_shape": [3, 8, 8]}, {"networks": {"mlp1w16": measured["networks"]["mlp1w16"]}}):
        (project / "other.json").write_text(json.dumps(measured | change))
        assert latency_of(Path("other.json"), load_params(Path("params.yaml")), tiny_teacher()) is None
    (project / "other.json").write_text("{}")
    result = run_stage("report", "--latency", "other.json", "--out", "elsewhere")
    assert result.exit_code == 1
    assert "other.json: cannot be read (" in result.stderr
    assert "make it with: python -m stages.latency" in result.stderr


@pytest.mark.parametrize("name", ["confusion.h5", "disagreements.h5"])
@pytest.mark.parametrize("content", [None, b"", b"no HDF5", "empty"])
def test_damaged_results_of_the_evaluation_are_named(tmp_path, name, content):
    if content == "empty":
        with written_hdf5(tmp_path / name):
            pass
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(.*make it with: python -m stages\.evaluate"):
        read_confusions(tmp_path / name, {"net": ["net"]}) if name == "confusion.h5" else read_disagreed(
            tmp_path / name
        )


def test_no_markdown_stands_on_a_page(page, project):
    assert not MARKDOWN.findall(page.text)
    assert not MARKDOWN.findall(Parsed((project / "reports/plots.html").read_text()).text)
    charts = [script for script in page.scripts if script.startswith("{")]
    assert charts
    assert not any(MARKDOWN.search(chart) for chart in charts)


def test_the_records_of_seeds_and_histograms_add_up(project):
    manifest = json.loads((project / "data/bss/manifest.json").read_text())
    rows = list(csv.DictReader((project / "reports/seeds.csv").open(newline="")))
    assert len(rows) == 2 * 3 * 2
    for name in ("probability_margins", "distances"):
        bins = list(csv.DictReader((project / f"reports/{name}.csv").open(newline="")))
        assert sum(int(each["samples"]) for each in bins) == manifest["totals"]["statuses"]["converged"]
    curves = list(csv.DictReader((project / "reports/curves.csv").open(newline="")))
    assert len(curves) == 2 * 3 * 2 * EPOCHS


def test_results_of_another_experiment_are_refused(project, monkeypatch):
    monkeypatch.chdir(project)
    results = json.loads((ROOT / "docs/results/views.json").read_text())
    for cell in results["cells"]:
        cell["labels"]["draw"] = cell["labels"].pop("views")
    (project / "other.json").write_text(json.dumps(results))
    result = run_stage("report", "--views", "other.json", "--out", "elsewhere")
    assert result.exit_code == 1
    assert "other.json: is of an experiment without the axis `views`" in result.stderr
    assert not (project / "elsewhere").exists()


def without_validation(project):
    """Learning curves as training writes them without a validation split."""
    for file in (project / "reports/students").rglob("curves.csv"):
        rows = list(csv.DictReader(file.open(newline="")))
        names = [name for name in rows[0] if not name.startswith("validation")]
        copy = project / "bare" / file.relative_to(project / "reports/students")
        copy.parent.mkdir(parents=True)
        copy.write_text(csv_text(names, [{name: row[name] for name in names} for row in rows]))


def without_pairs(project):
    """Results of an evaluation in which no image has a perturbation for all networks."""
    shutil.copytree(project / "reports/evaluation", project / "unpaired")
    for file in (project / "unpaired").glob("*-*.json"):
        values = json.loads(file.read_text())
        for each in values["seeds"]:
            each |= dict.fromkeys([name for name in each if "_sim" in name]) | {"pairs_common": 0}
        file.write_text(json.dumps(values))


def test_sections_without_content_say_so(project):
    without_validation(project)
    without_pairs(project)
    arguments = ("--curves", "bare", "--evaluation", "unpaired", "--views", "absent.json", "--out", "empty")
    code, _, errors = finish(fork_stage(project, "report", *arguments))
    assert code == 0, errors
    page = Parsed((project / "empty/report.html").read_text())
    assert tuple(each["id"] for tag, each in page.tags if each.get("id") in SECTIONS) == SECTIONS
    assert "None: there is no validation split." in page.text
    assert "Over the 0 pairs that all students have in common: too few to say anything." in page.text
    assert "Not measured for these parameters: make experiment-views trains" in page.text
    assert ("code", {}) in page.tags
    assert not MARKDOWN.findall(page.text)
    assert sum(script.startswith("{") for script in page.scripts) == 2 + 2
    assert (project / "empty/curves.csv").read_text().splitlines() == ["student,method,seed,epoch,validation_accuracy"]
    assert "no pairs" in (project / "empty/table.md").read_text()


def test_the_report_is_the_same_twice(project):
    code, _, errors = finish(
        fork_stage(project, "report", "--views", str(ROOT / "docs/results/views.json"), "--out", "again")
    )
    assert code == 0, errors
    assert (project / "again/report.html").read_bytes() == (project / "reports/report.html").read_bytes()


# In a browser

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
CONTRAST = 4.5  # of text and what is behind it, at least (WCAG 2, level AA)
DRAWN = "[...document.querySelectorAll('.chart')].every(each => each.querySelector('svg.marks'))"
BEHIND = """element => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  let behind = element;
  while (behind && (numbers(getComputedStyle(behind).backgroundColor)[3] ?? 1) < 1) behind = behind.parentElement;
  const style = getComputedStyle(element);
  const ink = element instanceof SVGElement ? style.fill : style.color;
  return [numbers(ink), numbers(behind ? getComputedStyle(behind).backgroundColor : "rgb(255, 255, 255)")];
}"""


@pytest.fixture(scope="module")
def browser(project):
    """Chromium; started after the project, whose stages fork this process."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is absent")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Opened:
    """A page of the browser and what it complained about or asked for."""

    def __init__(self, browser, path, drawn, **options):
        self.complaints, self.requests = [], []
        self.page = browser.new_page(**options)
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function(drawn, timeout=20_000)


@pytest.fixture
def opened(browser, project):
    """Open the report, with options of the browser's page."""
    pages = []

    def open_with(**options):
        pages.append(Opened(browser, project / "reports/report.html", DRAWN, **options))
        return pages[-1]

    yield open_with
    for each in pages:
        each.page.close()


def luminance(colour):
    """Relative luminance of (r, g, b), 0 to 255 each (WCAG 2)."""
    parts = np.array(colour[:3]) / 255
    linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(locator):
    ink, paper = (luminance(colour) for colour in locator.evaluate(BEHIND))
    return (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05), ink > paper


def test_the_browser_draws_all_charts_without_complaint_and_fetches_nothing(opened, page, project):
    view = opened()
    assert view.complaints == []
    beyond = [url for url in view.requests if not url.startswith(("data:", "blob:"))]
    assert beyond == [(project / "reports/report.html").as_uri()]
    charts_there = sum(script.startswith("{") for script in page.scripts)
    assert view.page.locator("svg.marks").count() == charts_there == 2 + 1 + 2 + 4 + 2
    for box in (each.bounding_box() for each in view.page.locator("svg.marks").all()):
        assert 200 < box["width"] < 1280
        assert 200 < box["height"] < 500


def test_every_section_and_picture_is_visible(opened):
    view = opened()
    for name in SECTIONS:
        assert view.page.locator(f"#{name}").is_visible()
        assert view.page.locator(f"#{name}").bounding_box()["height"] > 40
    assert view.page.evaluate("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
    assert view.page.evaluate("document.images.length") >= 4 * 3 + 7  # the gallery, and the maps of seven networks


def click(page, locator):
    """A click where an element is, whatever lies there, as of a person."""
    locator.scroll_into_view_if_needed()
    box = locator.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_timeout(100)


def faded(chart):
    """How many marks of a chart are faded."""
    opacities = "marks => marks.filter(mark => Number(mark.getAttribute('opacity') ?? 1) <= 0.1).length"
    return chart.locator(".role-mark path, .role-mark line").evaluate_all(opacities)


def test_a_click_on_the_legend_fades_the_other_methods_and_a_second_one_restores_them(opened):
    page = opened().page
    for name in ("accuracy", "views", "curves", "similarity"):
        chart = page.locator(f"#{name} .chart").first
        assert faded(chart) == 0
        for entry in (".role-legend-label text", ".role-legend-symbol path"):
            click(page, chart.locator(entry).last)
            assert faded(chart) > 0, name
            assert name != "accuracy" or faded(chart) == 2 * (2 + 1 + 1)  # dots, mean and deviation of two methods
            click(page, chart.locator(entry).last)
            assert faded(chart) == 0, name


def test_a_point_says_what_it_is(opened):
    page = opened().page
    assert not page.locator("#vg-tooltip-element.visible").count()
    page.locator("#accuracy .chart .mark-symbol.role-mark path").last.hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    text = page.locator("#vg-tooltip-element").inner_text()
    assert "method" in text
    assert "%" in text
    assert contrast(page.locator("#vg-tooltip-element td.value").first)[0] > CONTRAST


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_the_page_is_as_wide_as_the_window(opened, width):
    view = opened(viewport={"width": width, "height": 800})
    assert view.page.evaluate("document.documentElement.scrollWidth") <= width
    for box in (each.bounding_box() for each in view.page.locator("svg.marks").all()):
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable(opened, scheme):
    page = opened(color_scheme=scheme).page
    texts = {
        name: page.locator(selector).first
        for name, selector in {
            "body": "body",
            "finding": ".finding",
            "note": ".note >> nth=1",
            "table": "td",
            "navigation": "nav a",
            "axis labels": ".role-axis-label text",
            "axis title": ".role-axis-title text",
            "legend": ".role-legend-label text",
            "captions": "figcaption",
            "facts": "dt",
        }.items()
    }
    for name, locator in texts.items():
        ratio, light = contrast(locator)
        assert ratio > CONTRAST, name
        assert light == (scheme == "dark"), name


def test_print_is_light_and_without_navigation(opened):
    view = opened(color_scheme="dark")
    view.page.emulate_media(media="print", color_scheme="dark")
    assert not view.page.locator("nav").is_visible()
    for selector in ("body", ".finding", ".role-axis-label text"):
        ratio, light = contrast(view.page.locator(selector).first)
        assert ratio > CONTRAST
        assert not light
    assert view.page.locator("details:not([open]) dl").last.bounding_box()["height"] > 0  # parameters are printed
    assert view.page.pdf(format="A4").startswith(b"%PDF")


# The page of `dvc plots`

PLOTS_DRAWN = "[...document.querySelectorAll('body > div')].every(each => each.querySelector('canvas, svg'))"


@pytest.fixture(scope="module")
def plots(project, tmp_path_factory):
    """A git repository with the reports of the project, committed."""
    directory = tmp_path_factory.mktemp("plots") / "project"
    new_project(directory, {})
    shutil.copytree(project / "reports", directory / "reports")
    (directory / "reports/teacher").mkdir()
    (directory / "reports/teacher/curves.csv").write_text("epoch,validation_accuracy\n1,0.5\n2,0.75\n")
    git(directory, "add", "-f", "reports")
    commit(directory)
    return directory


def shown(directory, browser, *command):
    """The page that a command of DVC writes, opened."""
    dvc(directory, "plots", *command, "-o", "shown")
    return Opened(browser, directory / "shown/index.html", PLOTS_DRAWN)


def not_of_dvc(complaints):
    """All but what Vega says of DVC's own template, that of the teacher's curve."""
    own = (
        "The input spec uses Vega-Lite v5",
        'Infinite extent for field "epoch"',
        'extent for field "validation_accuracy"',
    )
    return [each for each in complaints if not any(text in each for text in own)]


@pytest.mark.parametrize("command", [("show",), ("diff", "HEAD")], ids=lambda command: command[0])
def test_plots_are_drawn_offline_for_one_and_two_revisions(browser, plots, command):
    curves = (plots / "reports/seeds.csv").read_text()
    (plots / "reports/seeds.csv").write_text(re.sub(r",0\.\d+,", ",0.5,", curves, count=1))
    view = shown(plots, browser, *command)
    assert not_of_dvc(view.complaints) == []
    assert [url for url in view.requests if not url.startswith(("data:", "blob:"))] == [
        (plots / "shown/index.html").as_uri()
    ]
    divs = view.page.locator("body > div")
    assert divs.count() == 7
    for box in (each.bounding_box() for each in divs.all()):
        assert box["width"] > 300
        assert box["height"] > 200
    for div in (divs.nth(0), divs.nth(1)):
        click(view.page, div.locator(".role-legend-symbol path").last)
        assert faded(div) > 0
        click(view.page, div.locator(".role-legend-symbol path").last)
        assert faded(div) == 0
    view.page.close()
    (plots / "reports/seeds.csv").write_text(curves)


def plot_specs(directory):
    """The specifications on a page of DVC, by title."""
    specs = re.findall(r"var spec = (\{.*?\});?\s*vegaEmbed", (directory / "shown/index.html").read_text(), re.S)
    return [json.loads(spec) for spec in specs]


def test_methods_have_colours_of_their_own_and_revisions_columns(plots):
    text = (plots / "reports/seeds.csv").read_text()
    (plots / "reports/seeds.csv").write_text(re.sub(r",0\.\d+,", ",0.5,", text, count=1))
    dvc(plots, "plots", "diff", "HEAD", "-o", "shown")
    ours = [spec for spec in plot_specs(plots) if "facet" in spec]
    assert len(ours) == 6
    svg = vl_convert.vegalite_to_svg(ours[0])
    dots = re.findall(r'aria-roledescription="circle"[^>]*?fill="([^"]+)"', svg)
    assert len(dots) == 2 * 3 * 2 * len({row["rev"] for row in ours[0]["data"]["values"]})
    assert {row["rev"] for row in ours[0]["data"]["values"]} == {"HEAD", "workspace"}
    assert len(set(dots)) == 3
    (plots / "reports/seeds.csv").write_text(text)


def test_plots_without_pairs_say_so_and_are_no_larger(browser, plots):
    text = (plots / "reports/seeds.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    names = list(rows[0])
    emptied = [row | dict.fromkeys((name for name in names if "_sim" in name), "") for row in rows]
    (plots / "reports/seeds.csv").write_text(csv_text(names, emptied))
    view = shown(plots, browser, "show")
    assert [each for each in not_of_dvc(view.complaints) if "Infinite extent" not in each] == []
    for box in (each.bounding_box() for each in view.page.locator("body > div").all()):
        assert 200 < box["height"] < 1000
    svg = vl_convert.vegalite_to_svg(plot_specs(plots)[3])
    assert svg.count(">none<") == 2 * 3 * 2
    view.page.close()
    (plots / "reports/seeds.csv").write_text(text)
