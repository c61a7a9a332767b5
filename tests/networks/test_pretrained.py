"""Weights that training goes on from: of a file, or a library's own; for other classes; frozen layers."""

import json
import os
import subprocess
import sys
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from torchvision import models

from pipeline.core.errors import ParameterError, WeightsError
from pipeline.networks.classifier import Architecture, build
from pipeline.networks.pretrained import LIBRARY, read_start
from pipeline.networks.weights import load_weights, save_weights
from pipeline.teacher import imported_teacher
from tests.support.files import ROOT, make_project, run_stage, tiny_params, tiny_teacher
from tests.support.fits import fit_tiny, student_run
from tests.support.helpers import random_prepared, tiny_resnet


def architecture(network="resnet8w2", classes=4, channels=1, side=8):
    return Architecture(network, classes, (channels, side, side), (0.5,) * channels, (0.25,) * channels)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "given.safetensors"
    given = tiny_resnet(7)
    given.architecture = given.architecture._replace(mean=(0.1,), std=(0.7,))
    save_weights(given, path)
    return path


def test_a_file_gives_its_weights_and_its_normalisation(file):
    kind = load_weights(file).architecture
    start = read_start(str(file), kind)
    assert start.anew == []
    expected = tiny_resnet(7).network.state_dict()
    assert start.state.keys() == expected.keys()
    assert all(torch.equal(start.state[name], value) for name, value in expected.items())
    assert start.normalised_as(architecture()).mean == (0.1,)
    assert start.normalised_as(architecture()).std == (0.7,)


def test_a_classifier_for_other_classes_begins_anew(file):
    known = load_weights(file).architecture
    start = read_start(str(file), known._replace(classes=known.classes + 3))
    assert start.anew == ["linear.bias", "linear.weight"]
    assert not {"linear.bias", "linear.weight"} & start.state.keys()
    assert "conv1.weight" in start.state
    assert start.digest != read_start(str(file), known).digest


@pytest.mark.parametrize(
    ("network", "channels", "expected"),
    [
        ("resnet14w2", 1, "not weights of resnet14w2: lacks 'layer1.1.bn1.bias'"),
        ("resnet8w4", 1, "not weights of resnet8w4"),
        ("resnet8w2", 3, "for images of 1 channels, expected 3: set dataset.channels"),
    ],
)
def test_weights_of_another_network_are_refused(file, network, channels, expected):
    with pytest.raises(WeightsError, match=expected):
        read_start(str(file), architecture(network, channels=channels))


@pytest.fixture
def hub(tmp_path):
    """Torch's cache of downloads, in a folder of its own."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path / "hub")
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    yield tmp_path / "hub/checkpoints"
    torch.hub.set_dir(before)


def test_torchvisions_own_weights_are_taken_from_its_cache_and_for_other_classes(hub):
    torch.manual_seed(3)
    theirs = models.squeezenet1_1(weights=None).state_dict()
    url = models.SqueezeNet1_1_Weights.DEFAULT.url
    torch.save(theirs, hub / url.rpartition("/")[2])
    kind = architecture("torchvision.squeezenet1_1", classes=5, channels=3, side=64)
    start = read_start(LIBRARY, kind)
    assert start.anew == ["classifier.1.bias", "classifier.1.weight"]
    assert torch.equal(start.state["features.0.weight"], theirs["features.0.weight"])
    assert start.normalised_as(kind).mean == (0.485, 0.456, 0.406)  # as torchvision has it for ImageNet
    gray = start.normalised_as(kind._replace(image_shape=(1, 64, 64)))
    assert gray.mean == (pytest.approx(0.449),)
    network = build(start.normalised_as(kind))
    missing = network.network.load_state_dict(start.state, strict=False)
    assert sorted(missing.missing_keys) == start.anew
    assert not missing.unexpected_keys


def test_a_teacher_can_be_the_librarys_where_its_classes_are_those_of_the_images(hub):
    torch.manual_seed(3)
    theirs = models.squeezenet1_1(weights=None).eval()
    torch.save(theirs.state_dict(), hub / models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2])
    wanted = tiny_params({"teacher.network": "torchvision.squeezenet1_1", "teacher.weights": LIBRARY}).teacher
    images = random_prepared(0, 3, shape=(3, 64, 64), classes=1000)
    teacher = imported_teacher(wanted, images)
    assert teacher.architecture.mean == (0.485, 0.456, 0.406)
    pixels = torch.from_numpy(images.images) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (teacher.architecture.mean, teacher.architecture.std))
    with torch.no_grad():
        torch.testing.assert_close(teacher.eval()(pixels), theirs((pixels - mean) / std))
    with pytest.raises(WeightsError, match="for other classes than the 4 of the prepared data: fine-tune them with"):
        imported_teacher(wanted, random_prepared(0, 3, shape=(3, 64, 64)))


def test_without_a_network_the_weights_of_a_library_are_an_error_in_one_line(hub, monkeypatch):
    def offline(*_, **__):
        raise URLError("no network here")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(WeightsError) as caught:
        read_start(LIBRARY, architecture("torchvision.squeezenet1_1", channels=3, side=64))
    message = str(caught.value)
    assert "torchvision.squeezenet1_1: the weights of torchvision cannot be had (URLError" in message
    assert str(hub) in message
    assert "\n" not in message


@pytest.mark.parametrize("network", ["resnet8w2", "own.networks.mine", "mlp2w8"])
def test_networks_of_no_library_have_no_weights(network):
    with pytest.raises(WeightsError, match=f"{network}: no library has weights for it: give a safetensors file"):
        read_start(LIBRARY, architecture(network))


TIMM = """
import json, sys
from pipeline.networks.classifier import Architecture
from pipeline.networks.pretrained import read_start
kind = Architecture("timm.mobilenetv3_small_050", 5, (3, 64, 64), (0.5,) * 3, (0.25,) * 3)
try:
    start = read_start("library", kind)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(json.dumps([start.anew, start.mean, float(start.state["conv_stem.weight"].sum())]))
"""


@pytest.mark.parametrize("cached", [True, False])
def test_timms_own_weights_are_taken_from_the_cache_of_hugging_face(tmp_path, cached):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("mobilenetv3_small_050", pretrained=False)
    if cached:
        folder = tmp_path / f"hub/models--{network.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("0" * 40)
        (folder / f"snapshots/{'0' * 40}").mkdir(parents=True)
        save_file(network.state_dict(), folder / f"snapshots/{'0' * 40}/model.safetensors")
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", TIMM], env=environment, capture_output=True, text=True, timeout=120)
    if cached:
        assert done.returncode == 0, done.stderr
        anew, mean, total = json.loads(done.stdout)
        assert anew == ["classifier.bias", "classifier.weight"]
        assert mean == list(network.pretrained_cfg["mean"])
        assert total == pytest.approx(float(network.conv_stem.weight.detach().sum()))
    else:
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("WeightsError: timm.mobilenetv3_small_050: the weights of timm cannot be had (")
        assert "HF_HOME" in last


# Students and teachers that go on from them

STAY = {"training.epochs": 1, "training.learning_rate": 1e-6, "training.momentum": 0.0, "seeds": 2}


def test_students_go_on_from_their_weights_each_as_part_of_a_stack(tmp_path, file):
    changes = STAY | {"pretrained": {"resnet8w2": str(file)}}
    run = student_run(tmp_path / "runs", tmp_path, "original", changes)
    assert run.architecture.mean == (0.1,)
    fits = run.fit_all()
    given, states = load_file(file), [load(fit.weights.read_bytes()) for fit in fits]
    assert len(states) == 2
    for state in states:
        torch.testing.assert_close(state["conv1.weight"], given["conv1.weight"], rtol=0, atol=1e-3)
        assert load_weights(fits[0].weights).architecture.mean == (0.1,)
    plain = student_run(tmp_path / "runs", tmp_path, "original", STAY)
    assert "start" not in plain.reads
    assert plain.key(0) != run.key(0)
    other = tiny_resnet(8)
    save_weights(other, file)
    assert student_run(tmp_path / "runs", tmp_path, "original", changes).key(0) != run.key(0)


def test_a_teacher_goes_on_from_weights_for_other_classes_which_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path, {"teacher.pretrained": "given.safetensors", "teacher.training.epochs": 8})
    (tmp_path / "models/teacher.safetensors").unlink()
    other = build(tiny_teacher().architecture._replace(classes=9))
    save_weights(other, tmp_path / "given.safetensors")
    result = run_stage("teacher")
    assert result.exit_code == 0, result.stderr
    told = "given.safetensors: the classifier is for other classes, and began anew: linear.bias, linear.weight"
    assert told in result.stderr + result.stdout


def test_frozen_layers_keep_weights_and_statistics(tmp_path):
    frozen = fit_tiny(tmp_path / "frozen", epochs=2, frozen=["conv1", "bn1", "layer1"]).weights
    state, kind = load(frozen.read_bytes()), load_weights(frozen).architecture
    torch.manual_seed(0)
    for name, value in build(kind).network.state_dict().items():
        kept = name.split(".")[0] in ("conv1", "bn1", "layer1")
        assert torch.equal(state[name], value) == kept, name


def test_a_frozen_layer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        ParameterError, match="frozen: network 'resnet8w2' has no layer 'layer9', expected some of: conv1"
    ):
        fit_tiny(tmp_path, epochs=1, frozen=["layer9"])
