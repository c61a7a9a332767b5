"""Students that cannot be trained beside others that can, and shards beside prepared files of another dataset."""

import numpy as np
import pytest

from pipeline.core.errors import ParameterError, TrainingError
from pipeline.core.store import Store
from pipeline.images.prepared import read_prepared, write_prepared
from pipeline.machine.processes import Processes
from pipeline.student.inputs import StudentInputs
from pipeline.student.run import StudentRun
from pipeline.training.objective import Objective
from tests.support.files import contents, make_project, run_stage, tiny_params
from tests.support.helpers import in_memory, random_prepared

TWO = {"methods": ["original", "hinton"], "seeds": 2, "attack.views": 1, "training.epochs": 2}


@pytest.fixture
def project(tmp_path, monkeypatch):
    make_project(tmp_path, TWO)
    monkeypatch.chdir(tmp_path)
    assert run_stage("attack").exit_code == 0
    return tmp_path


@pytest.fixture
def hinton_fails(monkeypatch):
    """Training from shards raises what torch raises on a network that it cannot train."""
    loss = Objective.loss

    def failing(self, student, batch, moment):
        if len(self.terms):
            raise ValueError("Expected more than 1 value per channel when training, got input size [1, 8, 1, 1]")
        return loss(self, student, batch, moment)

    monkeypatch.setattr(Objective, "loss", failing)


@pytest.mark.parametrize("workers", [1, 2])
def test_with_all_the_other_students_are_trained_and_the_exit_code_tells(project, hinton_fails, workers):
    make_project(project, TWO | {"methods": ["hinton", "original"], "runtime.workers": workers, "runtime.threads": 2})
    result = run_stage("student", "--all")
    assert result.exit_code == 1
    first, last = result.stderr.strip().splitlines()[0], result.stderr.strip().splitlines()[-1]
    assert first == (
        "error: resnet8w2-hinton seeds 0 to 3: ValueError: Expected more than 1 value per channel when training, got "
        "input size [1, 8, 1, 1] (--debug shows where); the other students go on"
    )
    assert last == "error: 1 of 2 students could not be trained: resnet8w2-hinton"
    assert "Traceback" not in result.stderr
    assert "wrote models/students/resnet8w2-original: 2 seeds (2 trained, 0 reused)" in result.stdout
    assert len(list((project / "models/students/resnet8w2-original").glob("*.safetensors"))) == 2
    assert not (project / "models/students/resnet8w2-hinton").exists()


def test_a_student_alone_fails_in_one_line_and_with_debug_in_a_traceback(project, hinton_fails):
    arguments = ("student", "--student", "resnet8w2", "--method", "hinton")
    result = run_stage(*arguments)
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("error: resnet8w2-hinton seeds 0 to 3: ValueError: Expected more than 1 value")
    debug = run_stage(*arguments, "--debug")
    assert isinstance(debug.exception, TrainingError)
    assert isinstance(debug.exception.__cause__, ValueError)


@pytest.mark.parametrize(
    ("rows", "batch_size", "devices", "refused"),
    [
        (9, 1, 1, True),
        (9, 4, 1, False),
        (10, 4, 1, False),
        (11, 4, 2, True),
        (8, 4, 2, False),
        (10, 4, 2, True),
        (12, 4, 3, True),
    ],
)
def test_a_single_image_for_batch_norm_on_one_pixel_is_refused_before_training(
    tmp_path, rows, batch_size, devices, refused
):
    # The last batch of 11 rows has 3: one device has two of them, the other one. resnet8 makes 1x1 maps of 4x4 pixels.
    train = random_prepared(0, rows, (1, 4, 4))
    params = tiny_params({"training.batch_size": batch_size})
    processes = Processes(params.runtime, params.training.precision)
    processes.count = devices

    def put_together():
        inputs = StudentInputs(train, None, None, None)
        return StudentRun.of(params, "resnet8w2", "original", inputs, processes, Store(tmp_path))

    if not refused:
        put_together()
        return
    with pytest.raises(ParameterError, match=r"resnet8w2-original: .* single image.*training\.batch_size"):
        put_together()


@pytest.fixture(params=[64, 20])
def other_images(project, request):
    """The prepared training images are replaced by others, of as many rows, or fewer."""
    path, rows = project / "data/prepared/train.h5", request.param
    train = read_prepared(path)
    images = np.ascontiguousarray(train.images[:rows, :, ::-1])
    write_prepared(path, in_memory(images, train.labels[:rows], train.class_names, train.mean, train.std))
    return project


def test_shards_of_other_images_than_the_prepared_ones_are_refused(other_images):
    before = contents(other_images / "data", other_images / "models")
    for command in (("student", "--all"), ("student", "--student", "resnet8w2", "--method", "hinton")):
        result = run_stage(*command)
        assert result.exit_code == 1
        assert len(result.stderr.strip().splitlines()) == 1
        assert "data/bss: was made from other training images than those in data/prepared" in result.stderr
        assert "--other-data" in result.stderr
    assert contents(other_images / "data", other_images / "models") == before


def test_where_it_is_wanted_two_datasets_are_compared_and_the_table_says_so(other_images):
    assert run_stage("student", "--all", "--other-data").exit_code == 0
    assert run_stage("evaluate").exit_code == 0
    refused = run_stage("report")
    assert refused.exit_code == 1
    assert "was made from other training images" in refused.stderr
    result = run_stage("report", "--other-data")
    assert result.exit_code == 0, result.stderr
    sentence = "Students from shards were trained on other images than those that are prepared"
    assert sentence in (other_images / "reports/table.md").read_text()
    assert sentence in (other_images / "reports/report.html").read_text()


def test_shards_train_without_prepared_files(project):
    for path in (project / "data/prepared").iterdir():
        path.unlink()
    assert run_stage("student", "--student", "resnet8w2", "--method", "hinton").exit_code == 0
