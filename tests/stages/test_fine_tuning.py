"""A teacher that goes on from given weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline.core.parameters import load_params
from pipeline.images.prepared import read_prepared
from pipeline.networks.weights import save_weights
from pipeline.teacher import teacher_architecture
from tests.support.files import make_project, run_stage, tiny_teacher
from tests.support.helpers import tiny_resnet

SHORT = {
    "teacher.network": "resnet8w2",
    "teacher.pretrained": "given.safetensors",
    "teacher.training.epochs": 1,
    "teacher.training.learning_rate": 1e-4,
    "teacher.training.momentum": 0.0,
    "teacher.training.weight_decay": 0.0,
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    make_project(tmp_path, SHORT)
    (tmp_path / "models/teacher.safetensors").unlink()
    save_weights(tiny_teacher(), tmp_path / "given.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(project):
    return load_file(project / "models/teacher.safetensors")


def test_training_begins_at_the_given_weights_and_moves_them(project):
    result = run_stage("teacher")
    assert result.exit_code == 0, result.stderr
    assert "resnet8w2, fine-tuned from given.safetensors for 1 epochs" in result.stdout
    given, tuned = tiny_teacher().network.state_dict(), weights(project)
    assert not torch.equal(tuned["linear.weight"], given["linear.weight"])
    torch.testing.assert_close(tuned["linear.weight"], given["linear.weight"], rtol=0, atol=1e-3)
    metrics = json.loads((project / "reports/teacher/metrics.json").read_text())
    assert metrics["train_accuracy"] > 0.9  # one epoch from random weights at this rate is chance


def test_other_weights_are_trained_on_anew_and_the_same_ones_found(project):
    assert run_stage("teacher").exit_code == 0
    first = weights(project)
    again = run_stage("teacher")
    assert "finished before" in again.stdout
    other = tiny_teacher()
    other.network.linear.bias.data += 0.01
    save_weights(other, project / "given.safetensors")
    assert run_stage("teacher").exit_code == 0
    assert not torch.equal(weights(project)["linear.bias"], first["linear.bias"])


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"teacher.weights": "given.safetensors"}, 2, "give one of them"),
        ({"teacher.pretrained": "nowhere.safetensors"}, 1, "nowhere.safetensors: no such weights file"),
        ({"teacher.network": "resnet14w2"}, 1, "given.safetensors: "),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_one_line(project, changes, code, message):
    make_project(project, SHORT | changes)
    (project / "models/teacher.safetensors").unlink()
    result = run_stage("teacher")
    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (project / "models/teacher.safetensors").exists()


def test_it_normalises_as_the_given_weights_do(project):
    save_weights(tiny_resnet(0, std=0.3), project / "given.safetensors")
    given = load_params(project / "params.yaml").teacher
    train = read_prepared(project / "data/prepared/train.h5")
    assert teacher_architecture(given, train).std == (0.3,)
