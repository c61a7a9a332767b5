"""Networks of libraries, images of all shapes: from files of images to a trained student."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.core.errors import WeightsError
from pipeline.core.network_names import check_network
from pipeline.images.prepared import write_prepared
from pipeline.networks.classifier import Architecture, build
from pipeline.networks.weights import load_weights, save_weights
from pipeline.shards.reader import BoundaryShards
from tests.support.files import run_stage, write_params
from tests.support.helpers import in_memory, random_prepared, untrained

GRAY, COLOUR = (0.5,), (0.5, 0.45, 0.4)


def architecture(network, classes, shape):
    statistics = GRAY if shape[0] == 1 else COLOUR
    return Architecture(network, classes, shape, statistics, tuple(value / 2 for value in statistics))


def run(name, *arguments):
    result = run_stage(name, *arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


CASES = [
    ("resnet8w2", "resnet8w2", 2, (1, 8, 8)),
    ("resnet8w2", "resnet8w4", 5, (3, 12, 20)),
    ("resnet8w2", "resnet8w2", 4, (3, 64, 64)),
    ("resnet8w2", "resnet8w2", 3, (1, 224, 224)),
    ("mlp3w16", "mlp1w4", 3, (1, 1, 2)),
    ("mlp2w8", "resnet8w2", 2, (3, 5, 1)),
    ("cifar.wrn_16_1", "cifar.mobilenetv2", 3, (1, 32, 32)),
    ("torchvision.resnet18", "torchvision.mobilenet_v3_small", 3, (3, 64, 48)),
    ("torchvision.shufflenet_v2_x0_5", "resnet8w2", 3, (1, 32, 32)),
    ("timm.test_convnext", "timm.test_efficientnet", 3, (1, 40, 32)),
    ("timm.test_vit3", "timm.test_resnet", 3, (3, 160, 160)),
]


@pytest.mark.parametrize(("teacher", "student", "classes", "shape"), CASES)
def test_from_images_to_a_student(tmp_path, monkeypatch, teacher, student, classes, shape):
    monkeypatch.chdir(tmp_path)
    images = random_prepared(0, 60, shape).images
    pixels = torch.from_numpy(images).float() / 255
    model = untrained(architecture(teacher, classes, shape), pixels)
    save_weights(model, tmp_path / "given.safetensors")
    with torch.no_grad():
        labels = model(pixels).argmax(1)
    for row, label in enumerate(labels):
        path = tmp_path / f"images/class {label}/{row:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[row, 0] if shape[0] == 1 else images[row].transpose(1, 2, 0)).save(path)
    write_params(
        tmp_path / "params.yaml",
        {
            "dataset.name": "imagefolder",
            "dataset.path": "images",
            "dataset.test_fraction": 0.2,
            "dataset.validation_fraction": 0.2,
            "views.padding": 0,
            "teacher.network": teacher,
            "teacher.weights": "given.safetensors",
            "attack.views": 1,
            "students": [student],
            "methods": ["bss"],
            "seeds": 1,
            "training.epochs": 1,
        },
    )
    assert f"{classes} classes, {shape[1]}x{shape[2]}, {'gray' if shape[0] == 1 else 'RGB'}" in run("prepare")
    assert "train accuracy 100.0%, validation accuracy 100.0%" in run("teacher")
    run("attack")
    statuses = BoundaryShards(tmp_path / "data/bss").manifest.totals.statuses
    assert statuses["converged"] >= 0.7 * sum(statuses.values())
    run("student", "--student", student, "--method", "bss")
    run("evaluate")
    trained = load_weights(tmp_path / f"models/students/{student}-bss/seed-0.safetensors")
    assert trained.architecture[:3] == (student, classes, shape)
    with open(tmp_path / f"reports/students/{student}-bss/curves.csv") as file:
        assert np.isfinite([float(row["loss"]) for row in csv.DictReader(file)]).all()


def test_a_thousand_classes_to_shards_and_a_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = random_prepared(0, 64, (3, 16, 16), classes=1000)
    pixels = torch.from_numpy(train.images).float() / 255
    model = untrained(architecture("resnet8w16", 1000, (3, 16, 16)), pixels)  # 64 features for as many classes
    labels = model(pixels).argmax(1).numpy()
    for name, rows in {"train": slice(0, 48), "validation": slice(48, 56), "test": slice(56, 64)}.items():
        split = in_memory(train.images[rows], labels[rows], train.class_names, model.architecture.mean, COLOUR)
        write_prepared(tmp_path / f"data/prepared/{name}.h5", split)
    save_weights(model, tmp_path / "models/teacher.safetensors")
    changes = {"views.padding": 0, "attack.views": 1, "attack.targets": 3, "training.epochs": 1, "seeds": 1}
    write_params(tmp_path / "params.yaml", changes)
    run("attack")
    shards = BoundaryShards(tmp_path / "data/bss")
    assert shards.manifest.columns["teacher_logits"].shape == (1000,)
    assert shards.manifest.totals.statuses["converged"] > 0.9 * 3 * 48
    run("student", "--student", "resnet8w2", "--method", "bss")


@pytest.mark.parametrize("name", ["torchvision.googlenet", "torchvision.vgg11", "timm.test_vit"])
def test_logits_come_out_of_networks_of_libraries(name):
    shape = (1, 160, 160)
    model = build(architecture(name, 7, shape))
    assert model.training
    images = torch.rand(2, *shape)
    assert model(images).shape == (2, 7)
    normalised = (images - 0.5) / 0.25
    channels = 1 if name.startswith("timm") else 3
    model.eval()
    assert torch.equal(model(images), model.network(normalised.expand(-1, channels, -1, -1)))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("torchvision.resnet19", "torchvision has no classifier 'resnet19'"),
        ("torchvision.fasterrcnn_resnet50_fpn", "torchvision has no classifier"),
        ("timm.resnet19", "timm has no model 'resnet19'"),
        ("timm.", "expected a network"),
        ("cifar.resnet26", r"unknown, expected one of: cifar\.resnet8, .*, cifar\.shufflenetv2"),
        ("cifar.", "expected a network"),
        ("vision.resnet18", "expected a network"),
        ("resnet18", "expected a network"),
        ("../resnet8", "expected a network"),
    ],
)
def test_names_that_no_network_has_are_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        check_network(name)


def test_a_tag_that_timm_does_not_know_is_one_line():
    with pytest.raises(WeightsError, match=r"network 'timm.test_vit.nonsense': .*nonsense"):
        build(architecture("timm.test_vit.nonsense", 3, (3, 160, 160)))


def test_without_timm_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm is not installed: pip install 'boundary-distillation\[timm\]'"):
        check_network("timm.test_vit")


@pytest.mark.parametrize(
    ("name", "size"),
    [("timm.test_vit3", 32), ("torchvision.vgg11", 8), ("torchvision.vit_b_32", 32), ("cifar.vgg8", 7)],
)
def test_a_network_that_cannot_take_the_images_is_refused_with_their_size(name, size):
    with pytest.raises(
        WeightsError, match=f"'{name}' does not take images of {size}x{size} .*: set dataset.image_size"
    ):
        build(architecture(name, 3, (3, size, size)))
