"""The commands, as a user runs them: the chain without DVC, reuse, interruption, and what bad input gets."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.images.prepared import read_prepared, write_prepared
from pipeline.networks.classifier import Classifier, build
from pipeline.networks.stack import MEMBERS
from pipeline.networks.weights import load_weights, save_weights
from pipeline.training import fit as training
from tests.support.files import (
    ROOT,
    contents,
    finish,
    flip_bit,
    fork_stage,
    make_project,
    relabelled,
    run_stage,
    start_stage,
    tiny_teacher,
    truncate,
    write_params,
)
from tests.support.helpers import in_memory, tiny_resnet

STAGES = ("prepare", "teacher", "attack", "student", "evaluate", "report")
METHODS = ("original", "hinton", "bss", "bss_online")
WRITTEN = ("data", "models", "reports")


def student(method):
    return ("student", "--student", "resnet8w2", "--method", method)


def succeed(process):
    """The output of a started stage that must end well."""
    code, stdout, stderr = finish(process)
    assert code == 0, stderr
    assert "Traceback" not in stderr
    return stdout


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder after all stages, and what each of them printed."""
    directory = tmp_path_factory.mktemp("chain")
    write_params(directory / "params.yaml", {"methods": list(METHODS)})
    output = {"prepare": succeed(start_stage(directory, "prepare"))}
    output["teacher"] = succeed(fork_stage(directory, "teacher"))
    output["attack"] = succeed(start_stage(directory, "attack"))
    students = {method: fork_stage(directory, *student(method)) for method in METHODS}  # all at once
    output |= {method: succeed(process) for method, process in students.items()}
    output["evaluate"] = succeed(fork_stage(directory, "evaluate"))
    output["report"] = succeed(start_stage(directory, "report"))
    return directory, output


SLOW_IMPORTS = {"lightning_fabric", "torchmetrics", "torchvision", "distributed", "sklearn", "scipy"}


@pytest.mark.parametrize(
    "stage", [("teacher",), ("attack",), student("bss"), ("evaluate",)], ids=lambda stage: stage[0]
)
def test_a_stage_that_has_nothing_to_do_imports_nothing_slow(chain, stage):
    name, *arguments = stage
    code = (
        f"import sys; from stages.{name} import main; main({arguments}, standalone_mode=False); "
        f"print(sorted({SLOW_IMPORTS} & set(sys.modules)))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=chain[0],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.stdout.splitlines()[-1] == "[]", process.stdout + process.stderr


def test_every_stage_ends_with_a_line_that_says_what_it_wrote(chain):
    _, output = chain
    written = {
        "prepare": "data/prepared: digits, 10 classes, 8x8, gray, images: train 170, validation 1,537, test 90",
        "teacher": "models/teacher.safetensors: resnet8w4, trained for 8 epochs",
        "attack": "data/bss: 16 shards (16 computed, 0 reused), 340 samples",
        "evaluate": "reports/evaluation: 8 students on 90 test images",
        "report": "reports/report.html, and table.md, summary.json and plot data beside it",
    } | {method: f"models/students/resnet8w2-{method}: 2 seeds (2 trained, 0 reused)" for method in METHODS}
    for name, text in written.items():
        assert output[name].splitlines()[-1].startswith(f"wrote {text}"), output[name]


def test_the_summary_has_a_figure_for_every_student_and_method(chain):
    directory, _ = chain
    summary = json.loads((directory / "reports/summary.json").read_text())
    assert set(summary) == {"dataset", "teacher", "students", "costs"}
    assert summary["dataset"] == "digits"
    assert 0.15 < summary["teacher"]["accuracy"] <= 1
    assert set(summary["students"]) == {"resnet8w2"}
    assert set(summary["students"]["resnet8w2"]) == set(METHODS)
    for figures in summary["students"]["resnet8w2"].values():
        for measure in ("accuracy", "agreement", "mag_sim", "ang_sim"):
            assert set(figures[measure]) == {"mean", "std", "n"}, measure
        for measure in ("accuracy", "agreement"):
            assert figures[measure]["n"] == 2
            assert 0 <= figures[measure]["mean"] <= 1
            assert 0 <= figures[measure]["std"] <= 1
        assert figures["mag_sim"]["mean"] is None or 0 <= figures["mag_sim"]["mean"] <= 1
        assert figures["ang_sim"]["mean"] is None or -1 <= figures["ang_sim"]["mean"] <= 1


def test_the_summary_sums_up_the_records_of_the_seeds(chain):
    directory, _ = chain
    summary = json.loads((directory / "reports/summary.json").read_text())["students"]["resnet8w2"]
    rows = list(csv.DictReader((directory / "reports/seeds.csv").open()))
    assert len(rows) == 8
    for method in METHODS:
        values = [float(row["accuracy"]) for row in rows if row["method"] == method]
        assert summary[method]["accuracy"]["mean"] == pytest.approx(np.mean(values), abs=1e-6)
        assert summary[method]["accuracy"]["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-6)
        assert f"| resnet8w2 | {method} | 2 |" in (directory / "reports/table.md").read_text()


def test_evaluated_accuracy_is_that_of_the_weights_on_the_test_split(chain):
    directory, _ = chain
    test = read_prepared(directory / "data/prepared/test.h5")
    images = torch.from_numpy(test.images).float() / 255
    for name, expected in (
        ("models/teacher.safetensors", json.loads((directory / "reports/evaluation/teacher.json").read_text())),
        (
            "models/students/resnet8w2-bss/seed-1.safetensors",
            json.loads((directory / "reports/evaluation/resnet8w2-bss.json").read_text())["seeds"][1],
        ),
    ):
        with torch.no_grad():
            predicted = load_weights(directory / name).eval()(images).argmax(1).numpy()
        assert expected["accuracy"] == pytest.approx((predicted == test.labels).mean(), abs=1e-6)


def test_curves_have_a_row_for_every_seed_and_epoch(chain):
    directory, _ = chain
    for method in METHODS:
        rows = list(csv.DictReader((directory / f"reports/students/resnet8w2-{method}/curves.csv").open()))
        assert [(row["seed"], row["epoch"]) for row in rows] == [("0", "1"), ("0", "2"), ("1", "1"), ("1", "2")]
        metrics = json.loads((directory / f"reports/students/resnet8w2-{method}/metrics.json").read_text())
        last = [float(row["validation_accuracy"]) for row in rows if row["epoch"] == "2"]
        assert metrics["validation_accuracy"] == pytest.approx(np.mean(last))


@pytest.fixture
def finished(chain, tmp_path, monkeypatch):
    """A copy of the finished folder, as the current one."""
    shutil.copytree(chain[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    """Run a stage in this process; it must end well."""
    result = run_stage(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_second_run_computes_nothing_and_publishes_the_same_bytes(finished):
    (finished / "reports/report.html").unlink()  # which says how long stages took
    before = contents(finished / "data", finished / "models/students", finished / "reports")
    shutil.rmtree(finished / "data/bss")
    shutil.rmtree(finished / "models/students")
    shutil.rmtree(finished / "reports/evaluation")
    assert "(0 computed, 16 reused)" in run("attack")
    for method in METHODS:
        assert "(0 trained, 2 reused)" in run(*student(method))
    run("evaluate")
    run("report")
    (finished / "reports/report.html").unlink()
    assert contents(finished / "data", finished / "models/students", finished / "reports") == before


def test_a_teacher_that_is_finished_before_is_published_with_the_same_bytes(finished):
    before = (finished / "models/teacher.safetensors").read_bytes()
    for _ in range(3):
        (finished / "models/teacher.safetensors").unlink()
        assert "finished before" in run("teacher")
        assert (finished / "models/teacher.safetensors").read_bytes() == before


@pytest.mark.parametrize("method", ["hinton", "bss"])
def test_students_train_from_shards_alone(finished, method):
    expected = [
        load_file(finished / f"models/students/resnet8w2-{method}/seed-{seed}.safetensors") for seed in range(2)
    ]
    shutil.rmtree(finished / "data/prepared")
    shutil.rmtree(finished / ".work")
    (finished / "models/teacher.safetensors").unlink()
    assert "2 seeds (2 trained, 0 reused)" in run(*student(method), "--out", "alone", "--reports", "alone-reports")
    for seed in range(2):
        state = load_file(finished / f"alone/resnet8w2-{method}/seed-{seed}.safetensors")
        for name, tensor in expected[seed].items():
            assert torch.equal(state[name], tensor), name
    rows = list(csv.DictReader((finished / f"alone-reports/resnet8w2-{method}/curves.csv").open()))
    assert "validation_accuracy" not in rows[0]


def test_shards_commands_check_describe_and_adopt(finished):
    assert "whole, 16 shards, 340 samples" in run("shards", "verify", "data/bss")
    facts = run("shards", "info", "data/bss")
    assert "classes                   10: 0, 1, 2" in facts
    assert "samples                   340" in facts
    shutil.rmtree(finished / ".work/shards")
    assert "16 shards are new in the store, 0 were there" in run("shards", "adopt", "data/bss")
    assert "(0 computed, 16 reused)" in run("attack")


def test_verify_names_all_that_is_wrong_and_exits_with_1(finished):
    truncate(finished / "data/bss/view-000-block-00001.h5")
    flip_bit(finished / "data/bss/view-001-block-00000.h5", 3000)
    result = run_stage("shards", "verify", "data/bss")
    assert result.exit_code == 1
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == [
        "data/bss/view-000-block-00001.h5",
        "data/bss/view-001-block-00000.h5",
        "data/bss",
    ]


def test_damaged_published_shards_are_mended_by_the_attack(finished):
    before = contents(finished / "data/bss")
    truncate(finished / "data/bss/view-000-block-00001.h5")
    assert "(0 computed, 16 reused)" in run("attack")
    assert contents(finished / "data/bss") == before


def test_prune_removes_what_the_parameters_no_longer_ask_for(finished):
    write_params(finished / "params.yaml", {"attack.views": 1})
    result = run_stage("attack", "--prune")
    assert result.exit_code == 0
    assert "removed 8 other shards from .work/shards" in result.stderr
    assert len(list((finished / ".work/shards").rglob("*.h5"))) == 8


def planned(*arguments):
    """The lines of `attack --plan` by their first word."""
    return dict(line.split(maxsplit=1) for line in run("attack", "--plan", *arguments).splitlines())


def test_a_plan_says_what_is_to_be_made_and_makes_nothing(finished):
    before = contents(*(finished / name for name in WRITTEN))
    copy = sum(path.stat().st_size for path in (finished / "data/bss").glob("*.h5")) / 1e6
    assert planned()["shards"] == "0 to make, 16 in .work/shards: 16"
    write_params(finished / "params.yaml", {"attack.views": 6})
    plan = planned()
    assert plan["shards"] == "32 to make, 16 in .work/shards: 48"
    assert plan["rows"].startswith("680 to search of 1,020: 6 views of 170 images; target classes of each: 1")
    assert float(plan["bytes"].split()[0]) == pytest.approx(3 * copy, rel=0.1)
    assert "data/bss and DVC's cache share on one disk" in plan["bytes"]
    assert plan["time"].startswith("about 0:0")  # seconds, or a minute on a busy machine
    shutil.rmtree(finished / ".work/shards")
    assert planned()["shards"] == "48 to make, 0 in .work/shards: 48"
    assert contents(*(finished / name for name in WRITTEN)) == before
    assert not list((finished / ".work/shards").rglob("*.h5"))


HELP = [(name,) for name in STAGES] + [("shards", command) for command in ("verify", "info", "adopt")]


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help_shows_an_example(command):
    result = run_stage(*command, "--help")
    assert result.exit_code == 0
    assert f"Example: python -m stages.{' '.join(command)}" in " ".join(result.stdout.split())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder as after `prepare`, `teacher` and `attack`, of tiny images, with one trained student."""
    directory = tmp_path_factory.mktemp("tiny")
    make_project(directory, {"methods": ["original"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        run("attack")
        run(*student("original"))
        run("evaluate")
    return directory


@pytest.fixture
def project(tiny, tmp_path, monkeypatch):
    """A copy of the tiny folder without the store, as the current one."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".work"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(changes):
    return lambda project: write_params(project / "params.yaml", changes)


def import_weights(make):
    """Set `teacher.weights` to a file made by `make(path)`."""

    def spoil(project):
        make(project / "given")
        write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "teacher.weights": "given"})

    return spoil


def save_another_architecture(path):
    save_weights(tiny_teacher(), path)
    state = load_file(path)
    state["linear.weight"] = torch.zeros(7, 8)
    save_file(state, path)


def untrained_teacher(path):
    teacher = tiny_teacher()
    for parameter in teacher.parameters():
        parameter.zero_()  # always the first class
    save_weights(teacher, path)


def save_for_ten_classes(path):
    """Weights of the right kind for other data."""

    def spoil(project):
        save_weights(build(tiny_teacher().architecture._replace(classes=10)), project / path)

    return spoil


def another_teacher(project):
    teacher = tiny_teacher()
    teacher.network.linear.bias += 1
    save_weights(teacher, project / TEACHER)


def rotated_labels(project):
    path = project / "data/prepared/train.h5"
    train = read_prepared(path)
    write_prepared(path, relabelled(train, (train.labels + 1) % 4))


def reversed_classes(project):
    path = project / "data/prepared/validation.h5"
    split = read_prepared(path)
    names = split.class_names[::-1]
    write_prepared(path, in_memory(split.images, 3 - split.labels, names, split.mean, split.std))


def other_classes(project):
    path = project / "data/prepared/validation.h5"
    split = read_prepared(path)
    names = (*split.class_names, "more")
    write_prepared(path, in_memory(split.images, split.labels, names, split.mean, split.std))


def mixed_labels(project):
    path = project / "data/prepared/train.h5"
    train = read_prepared(path)
    write_prepared(path, relabelled(train, (train.labels + np.arange(len(train.labels)) // 4) % 4))


def prepared_image_changed(project):
    path = project / "data/prepared/train.h5"
    with h5py.File(path, "r") as file:
        position = file["image"].id.get_offset()
    flip_bit(path, position + 10)


def remove(path):
    return lambda project: (project / path).unlink()


def write(path, content):
    return lambda project: (project / path).write_bytes(content)


TRAIN, TEACHER = "data/prepared/train.h5", "models/teacher.safetensors"
SEED = "models/students/resnet8w2-original/seed-1.safetensors"
NAN = {"training.learning_rate": 1e30, "teacher.training.learning_rate": 1e30}

# What is done to the folder, the command, its exit code, and what the one line must say.
BAD = {
    "views 0": (
        change({"attack.views": 0}),
        ("attack",),
        2,
        "attack.views: Input should be greater than or equal to 1",
    ),
    "unknown key": (change({"attack.viewz": 3}), ("prepare",), 2, "attack.viewz: unknown parameter; known here: "),
    "unknown network": (change({"students": ["vgg"]}), ("teacher",), 2, "students.0: expected a network resnet<6n+2>"),
    "as many targets as classes": (change({"attack.targets": 4}), ("attack",), 2, "attack.targets: expected at most 3"),
    "unknown method": (None, student("vid"), 2, "--method: expected one of "),
    "unknown student": (
        None,
        ("student", "--student", "vgg", "--method", "original"),
        2,
        "--student: expected a network",
    ),
    "no parameter file": (remove("params.yaml"), ("report",), 2, "params.yaml: cannot be read: No such file"),
    "parameters no YAML": (write("params.yaml", b"a: ["), ("report",), 2, "params.yaml: not valid YAML"),
    "prepared missing": (remove(TRAIN), ("attack",), 1, f"{TRAIN}: no such prepared file"),
    "prepared missing for a student": (remove(TRAIN), student("original"), 1, f"{TRAIN}: no such prepared file"),
    "prepared truncated": (lambda p: truncate(p / TRAIN), ("attack",), 1, f"{TRAIN}: not a whole prepared file"),
    "prepared changed": (prepared_image_changed, ("attack",), 1, f"{TRAIN}: its content does not match its digest"),
    "teacher missing": (remove(TEACHER), ("attack",), 1, f"{TEACHER}: no such weights file"),
    "teacher missing for a student": (remove(TEACHER), student("bss_online"), 1, f"{TEACHER}: no such weights file"),
    "teacher missing for its features": (
        remove(TEACHER),
        student("at"),
        1,
        f"{TEACHER}: no such file, and resnet8w2-at",
    ),
    "teacher of other samples": (
        another_teacher,
        student("fitnet"),
        1,
        f"{TEACHER}: not the teacher of the samples in",
    ),
    "layers that do not exist": (
        change({"method.rkd.rkd.student_layers": ["layer7"]}),
        student("rkd"),
        2,
        "network 'resnet8w2' has no layer 'layer7', expected one of: conv1, bn1",
    ),
    "one epoch for two stages": (
        change({"training.epochs": 1}),
        student("fsp"),
        2,
        "training.epochs: a method with a first stage of its own needs at least 2",
    ),
    "teacher truncated": (lambda p: truncate(p / TEACHER), ("attack",), 1, f"{TEACHER}: not a readable safetensors"),
    "teacher of other classes": (
        save_for_ten_classes(TEACHER),
        ("attack",),
        1,
        f"{TEACHER}: a teacher for images (1, 8, 8) of 10",
    ),
    "import another architecture": (
        import_weights(save_another_architecture),
        ("teacher",),
        1,
        "given: not the weights of resnet8w2: 'linear.weight' has shape (7, 8), expected (4, 8)",
    ),
    "import a pickle": (
        import_weights(lambda path: torch.save(tiny_teacher().state_dict(), path)),
        ("teacher",),
        1,
        "given: not a readable safetensors file",
    ),
    "import nothing": (import_weights(lambda path: None), ("teacher",), 1, "given: no such weights file"),
    "import weights for other channels": (
        import_weights(lambda path: save_weights(tiny_resnet(0, shape=(3, 8, 8)), path)),
        ("teacher",),
        1,
        "the teacher normalises 3 channels, the images have 1: set teacher.mean and teacher.std",
    ),
    "import a teacher near chance": (
        import_weights(untrained_teacher),
        ("teacher",),
        1,
        "the teacher classifies 25.0% of the images correctly, chance is 25.0%",
    ),
    "samples in another order": (
        reversed_classes,
        student("bss"),
        1,
        "another order than the validation split: class 0 is 'bird' there, 'frog' here",
    ),
    "samples of fewer classes": (other_classes, student("bss"), 1, "the validation split has 5 classes of images"),
    "attack a teacher of other classes": (rotated_labels, ("attack",), 1, "the teacher's classes are in another order"),
    "attack a teacher near chance": (mixed_labels, ("attack",), 1, "of the images correctly, chance is 37.5%"),
    "NaN in the teacher's training": (change(NAN | {"teacher.network": "resnet8w2"}), ("teacher",), 1, "the loss is "),
    "NaN in a student's training": (change(NAN), student("original"), 1, "the loss of seed "),
    "shards missing": (remove("data/bss/manifest.json"), student("bss"), 1, "data/bss/manifest.json: no such file"),
    "shard missing": (remove("data/bss/view-000-block-00000.h5"), student("bss"), 1, "block-00000.h5: missing"),
    "shard truncated": (
        lambda p: truncate(p / "data/bss/view-001-block-00002.h5"),
        student("hinton"),
        1,
        "data/bss/view-001-block-00002.h5: has ",
    ),
    "adopt a changed shard": (
        lambda p: flip_bit(p / "data/bss/view-001-block-00002.h5", 3000),
        ("shards", "adopt", "data/bss"),
        1,
        "data/bss/view-001-block-00002.h5: its sha256 is not the manifest's",
    ),
    "describe what is no dataset": (None, ("shards", "info", "models"), 1, "models/manifest.json: cannot be read"),
    "student missing": (remove(SEED), ("evaluate",), 1, f"{SEED}: no such weights file"),
    "student of other data": (save_for_ten_classes(SEED), ("evaluate",), 1, SEED),
    "evaluation missing": (remove("reports/evaluation/teacher.json"), ("report",), 1, "teacher.json: cannot be read"),
    "evaluation without its records": (
        write("reports/evaluation/resnet8w2-original.json", b"{}"),
        ("report",),
        1,
        "reports/evaluation/resnet8w2-original.json",
    ),
    "evaluation of fewer figures": (
        write("reports/evaluation/resnet8w2-original.json", b'{"seeds": [{"seed": 0}]}'),
        ("report",),
        1,
        "reports/evaluation/resnet8w2-original.json",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_what_is_published(project, case):
    spoil, command, exit_code, expected = BAD[case]
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "methods": ["original"]})
    if spoil:
        spoil(project)
    published = [project / name for name in ("data", "models", "reports")]
    before = contents(*published)
    result = run_stage(*command)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == exit_code
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert contents(*published) == before


def test_debug_shows_the_traceback(project):
    result = run_stage("attack", "--teacher", "none.safetensors", "--debug")
    assert type(result.exception).__name__ == "WeightsError"


def test_a_bad_parameter_has_its_exit_code_and_no_traceback_in_a_shell(project):
    write_params(project / "params.yaml", {"attack.views": 0})
    code, stdout, stderr = finish(start_stage(project, "prepare"))
    assert (code, stdout) == (2, "")
    assert stderr == "error: params.yaml: attack.views: Input should be greater than or equal to 1 (got 0)\n"


# A limit below the size of the first file that the stage writes, and that file.
FULL = {
    "prepare": (("prepare",), 20_000, "data/.prepared"),
    "attack": (("attack",), 10_000, ".work/shards/"),
    "student": (student("original"), 1000, ".work/fits/"),
    "evaluate": (("evaluate",), 2000, ".work/comparisons/"),
}


@pytest.mark.parametrize("case", FULL)
def test_a_full_disk_is_one_line_and_leaves_what_is_published(project, case):
    command, limit, named = FULL[case]
    published = [project / name for name in ("data", "models", "reports")]
    before = contents(*published)

    exit_code, stdout, stderr = finish(fork_stage(project, *command, file_size=limit))
    assert (exit_code, stdout) == (1, "")
    assert "Traceback" not in stderr
    assert len(stderr.splitlines()) == 1
    assert stderr.startswith("error: ")
    assert named in stderr
    assert "no space" in stderr
    assert contents(*published) == before


@pytest.mark.parametrize("command", [("prepare",), ("attack",), student("original"), ("evaluate",), ("report",)])
def test_a_file_where_a_folder_is_wanted_is_one_line(project, command):
    (project / "file").write_text("mine")
    result = run_stage(*command, "--out", "file/out")
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "file/out" in result.stderr
    assert (project / "file").read_text() == "mine"


MESSAGE = "interrupted: what is finished is kept, run the same command to go on"


def interrupt_when(process, condition):
    """Press Ctrl-C once a condition holds; the process must end with its message. Returns its standard error."""
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    code, _, stderr = finish(process)
    assert code == 130, stderr
    assert MESSAGE in stderr
    return stderr


def test_an_interrupted_attack_goes_on(project, tiny):
    shutil.rmtree(project / "data/bss")
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "attack.views": 1000})
    process = fork_stage(project, "attack")
    stderr = interrupt_when(process, lambda: list(project.glob(".work/shards/*/*.sha256")))
    assert stderr.split() == MESSAGE.split()
    assert not (project / "data/bss").exists()
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2"})
    output = run("attack")
    computed = int(output.split(" computed")[0].split("(")[-1])
    assert computed < 6
    assert f"({computed} computed, {6 - computed} reused)" in output
    assert {path.name: path.read_bytes() for path in (project / "data/bss").iterdir()} == {
        path.name: path.read_bytes() for path in (tiny / "data/bss").iterdir()
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_student_goes_on(project, monkeypatch, workers):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1)  # after every epoch
    changes = {"training.epochs": 20, "runtime.workers": workers, "runtime.threads": workers}
    write_params(project / "params.yaml", {"seeds": 8 * MEMBERS} | changes)
    process = fork_stage(project, *student("original"), "--out", "new")
    first = workers * MEMBERS

    def first_seeds_done_and_next_ones_begun():
        done, begun = (list(project.glob(f".work/fits/*/{name}")) for name in ("curve.json.sha256", "stack.pt"))
        return len(done) >= first and len(begun) >= workers

    interrupt_when(process, first_seeds_done_and_next_ones_begun)
    assert not (project / "new").exists()
    write_params(project / "params.yaml", {"seeds": first + 1} | changes)
    assert f"{first + 1} seeds (1 trained, {first} reused)" in run(*student("original"), "--out", "new")


def test_an_interrupt_stops_all_seeds_at_once_and_says_one_thing(project, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1)  # after every epoch
    long = {"training.epochs": 100_000, "seeds": 10, "runtime.workers": 2, "runtime.threads": 2}
    write_params(project / "params.yaml", long)
    process = fork_stage(project, *student("original"), "--out", "new")
    stderr = interrupt_when(process, lambda: len(list(project.glob(".work/fits/*/stack.pt"))) == 2)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # the workers are gone too
    assert stderr.split() == MESSAGE.split()


def test_seeds_side_by_side_with_several_threads_each_end(project):
    # Enough samples for torch to use its threads while it loads them.
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "attack.views": 10})
    run("attack")
    write_params(project / "params.yaml", {"runtime.workers": 2, "runtime.threads": 4})
    # In a fresh Python: a fork of this one hangs if any test before has used several threads.
    code, stdout, stderr = finish(start_stage(project, *student("bss")))
    assert code == 0, stderr
    assert "2 seeds (2 trained, 0 reused)" in stdout


def test_seeds_side_by_side_with_a_large_teacher_in_the_loop_end(project):
    # Large enough for torch to use its threads on one of its tensors.
    architecture = load_weights(project / "models/teacher.safetensors").architecture
    save_weights(build(architecture._replace(network="resnet8w64")), project / "models/teacher.safetensors")
    write_params(project / "params.yaml", {"runtime.workers": 2, "runtime.threads": 4, "training.epochs": 1})
    code, stdout, stderr = finish(start_stage(project, *student("hinton_online")))
    assert code == 0, stderr
    assert "2 seeds (2 trained, 0 reused)" in stdout


def test_seeds_that_ask_for_endless_memory_are_one_line(project, monkeypatch):
    def ask(*arguments):
        torch.empty(1 << 50)

    monkeypatch.setattr(training.TrainingRun, "train_epoch", ask)
    for workers in (1, 2):
        write_params(project / "params.yaml", {"runtime.workers": workers, "runtime.threads": workers})
        result = run_stage(*student("original"), "--out", "new")
        assert (result.exit_code, result.stdout) == (1, "")
        assert len(result.stderr.splitlines()) == 1
        expected = "error: resnet8w2-original seeds 0 to 3: out of memory: lower training.batch_size or"
        assert result.stderr.startswith(expected)


def given_teacher(project, changes=None):
    """A teacher's weights in the file `given` that are right for another normalisation than the prepared data's."""
    teacher = tiny_teacher()
    mean, std = teacher.architecture.mean[0], teacher.architecture.std[0]
    with torch.no_grad():  # the same function of the pixels with deviation 0.5
        conv = teacher.network.conv1
        conv.weight.mul_(0.5 / std)
    other = Classifier(teacher.network, teacher.architecture._replace(mean=(mean,), std=(0.5,)))
    save_weights(other.eval(), project / "given")
    write_params(
        project / "params.yaml", {"teacher.network": "resnet8w2", "teacher.weights": "given"} | (changes or {})
    )
    return mean


def test_an_imported_teacher_normalises_as_its_file_says_or_the_parameters(project):
    mean = given_teacher(project)
    assert "imported from given, train accuracy 100.0%" in run("teacher")
    described = load_weights(project / "models/teacher.safetensors").architecture
    assert described.std == (0.5,)
    save_file(load_file(project / "given"), project / "given")  # as published weights are: without a description
    run("teacher")
    assert load_weights(project / "models/teacher.safetensors").architecture.std != (0.5,)
    given = {"teacher.weights": "given", "teacher.network": "resnet8w2", "teacher.mean": [mean], "teacher.std": [0.5]}
    write_params(project / "params.yaml", given)
    run("teacher")
    assert load_weights(project / "models/teacher.safetensors").architecture == described


def test_a_pickled_teacher_is_converted_and_imported(project):
    torch.save({"net": tiny_teacher().network.state_dict()}, project / "mine.pt")
    assert "set teacher.weights: mine.safetensors" in run("teacher", "convert", "mine.pt")
    write_params(project / "params.yaml", {"teacher.network": "resnet8w2", "teacher.weights": "mine.safetensors"})
    assert "imported from mine.safetensors, train accuracy 100.0%" in run("teacher")


def imported_after(statement):
    """The names of the modules that a fresh Python has loaded after a statement."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    return set(json.loads(result.stdout))


def test_commands_without_networks_start_without_torch():
    modules = imported_after("import stages.shards, stages.prepare")
    assert "stages.prepare" in modules
    assert "torch" not in modules


def test_no_stage_needs_dvc_or_imports_dask_unasked():
    names = sorted(path.stem for path in (ROOT / "stages").glob("*.py"))
    assert set(STAGES) <= set(names)
    modules = imported_after("import " + ", ".join(f"stages.{name}" for name in names if name != "__init__"))
    assert "stages.student" in modules
    assert not {name for name in modules if name.split(".")[0] in ("dvc", "dvclive", "dask", "distributed")}


def two_processes(project, launcher, method, student="timm.test_mambaout"):
    """Train with two processes by a launcher; returns the weights of seed 0."""
    write_params(project / "params.yaml", {"seeds": 1, "runtime.devices": 2 if launcher == "fabric" else 1})
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["--student", student, "--method", method, "--out", launcher]
    result = subprocess.run(
        [sys.executable, *(torchrun if launcher == "torchrun" else []), "-m", "stages.student", *arguments],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("wrote ") == 1
    return load_file(project / launcher / f"{student}-{method}/seed-0.safetensors")


@pytest.mark.parametrize("launcher", ["torchrun", "fabric"])
def test_two_processes_end_with_the_weights_of_one(project, launcher):
    write_params(project / "params.yaml", {"seeds": 1})
    run("student", "--student", "timm.test_mambaout", "--method", "original", "--out", "one")
    shutil.rmtree(project / ".work")
    one, two = (
        load_file(project / "one/timm.test_mambaout-original/seed-0.safetensors"),
        two_processes(project, launcher, "original"),
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


def test_two_processes_train_from_shards(project):
    weights = two_processes(project, "fabric", "bss", "resnet8w2")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_method_with_layers_of_its_own_is_refused_on_two_processes(project):
    write_params(project / "params.yaml", {"seeds": 1, "runtime.devices": 2})
    result = subprocess.run(
        [sys.executable, "-m", "stages.student", "--student", "resnet8w2", "--method", "fitnet_one_stage"],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert "trains on one device: set runtime.devices to 1" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
