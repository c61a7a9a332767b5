"""What training would cost: steps of a known length, what is finished, and nothing that is kept."""

import time

import pytest

from pipeline.networks.stack import MEMBERS
from pipeline.student.plan import plan_student
from pipeline.training.objective import Objective
from tests.support.files import contents, make_project, publish_samples, run_stage
from tests.support.fits import student_run

STEP = 0.1  # seconds, of 16 images of each member
IMAGES = 64  # of an epoch


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return publish_samples(tmp_path_factory.mktemp("samples"))


@pytest.fixture
def slow_first_half(monkeypatch):
    """Steps take so long in the first half of training."""
    loss = Objective.loss

    def slow(self, student, batch, moment):
        if moment.epoch < moment.epochs / 2:
            time.sleep(STEP)
        return loss(self, student, batch, moment)

    monkeypatch.setattr(Objective, "loss", slow)


@pytest.mark.parametrize(
    ("method", "changes", "at_once"),
    [
        ("bss", {}, MEMBERS),  # a stack
        ("bss", {"seeds": 8, "runtime.workers": 2, "runtime.threads": 2}, 2 * MEMBERS),
        ("original", {}, MEMBERS),
        ("bss", {"training.clip_norm": 1.0}, 1),  # no stack
        ("at", {}, 1),
    ],
)
def test_steps_of_all_of_training_are_measured_as_they_are_taken(
    tmp_path, samples, slow_first_half, method, changes, at_once
):
    run = student_run(tmp_path / "fits", samples, method, changes | {"training.epochs": 40})
    found = plan_student(run)
    assert found.runs == run.params.seeds
    # Steps of the other half take no time, or nearly as much on a busy machine.
    most = 16 * at_once / (STEP / 2)
    assert most / 3 < found.rate < most
    trained = 3600 * found.hours * found.rate / (40 * IMAGES * -(-run.params.seeds // at_once) * at_once)
    assert 1 < trained < 1.5  # the validation split is evaluated along
    assert not (tmp_path / "fits").exists()


def test_what_is_finished_costs_nothing(tmp_path, samples):
    run = student_run(tmp_path, samples, "bss")
    run.fit_all()
    assert plan_student(run) == (0, None, 0)
    more = student_run(tmp_path, samples, "bss", {"seeds": 5})
    assert plan_student(more).runs == 1


@pytest.fixture
def project(tmp_path, monkeypatch):
    make_project(tmp_path, {"methods": ["original", "bss"], "seeds": 2, "attack.views": 1})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_says_what_it_would_train_and_trains_nothing(project):
    assert run_stage("attack").exit_code == 0
    assert run_stage("student", "--student", "resnet8w2", "--method", "original").exit_code == 0
    before = contents(project)
    result = run_stage("student", "--plan")
    assert result.exit_code == 0, result.stderr
    header, original, bss, total, note = result.stdout.splitlines()
    assert header.split() == ["student", "method", "runs", "images/s", "hours"]
    assert original.split() == ["resnet8w2", "original", "0", "-", "0.000"]
    assert bss.split()[:3] == ["resnet8w2", "bss", "2"]
    assert float(bss.split()[3].replace(",", "")) > 0
    assert total.split() == ["sum", "2", bss.split()[4]]
    assert note == "2 runs are finished; hours by 1 workers on cpu"
    assert contents(project) == before


def test_without_samples_the_way_to_them_is_said(project):
    result = run_stage("student", "--plan")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: data/bss/manifest.json: no such file, and methods with source 'shards' train on a sample dataset: make "
        "it with python -m stages.attack, or take a method with source 'fresh' or 'online'\n"
    )
    result = run_stage("student", "--student", "resnet8w2", "--method", "original", "--plan")
    assert result.exit_code == 0, result.stderr
    assert "resnet8w2  original" in result.stdout


def test_a_plan_is_of_this_machine(project):
    result = run_stage("student", "--plan", "--scheduler", "2")
    assert result.exit_code == 2
    assert "--plan: trains nothing and counts this machine's workers on one device" in result.stderr
