"""Teachers from elsewhere: from the file that somebody has to the teacher that samples are made of."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.images.prepared import write_prepared
from pipeline.networks.classifier import Architecture
from pipeline.networks.weights import load_weights, save_weights
from tests.support.files import CLASS_NAMES, run_stage, tiny_splits, tiny_teacher, write_params
from tests.support.helpers import in_memory, random_prepared, untrained


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with prepared tiny images of four classes, in which commands run."""
    monkeypatch.chdir(tmp_path)
    for name, split in tiny_splits().items():
        write_prepared(tmp_path / f"data/prepared/{name}.h5", split)
    write_params(tmp_path / "params.yaml", {"teacher.network": "resnet8w2", "teacher.weights": "mine.safetensors"})
    return tmp_path


def run(*arguments):
    result = run_stage(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def refusal(*arguments):
    """The one line of a command that must fail."""
    result = run_stage(*arguments)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def known_by(model, rows=80, shape=(3, 32, 32)):
    """Prepared data whose labels are what a model says."""
    images = random_prepared(0, rows, shape).images
    labels = model(torch.from_numpy(images).float() / 255).argmax(1).numpy()
    names = tuple(f"class {number}" for number in range(model.architecture.classes))
    return in_memory(images, labels, names, model.architecture.mean, model.architecture.std)


def heads(state):
    """Auxiliary heads, of which a converted file has nothing."""
    return {f"{name}.fc2.weight": torch.ones(9, 9) for name in ("aux1", "aux2")} | state


@pytest.mark.parametrize(
    ("network", "form"),
    [
        ("resnet14w4", lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 9}),
        ("torchvision.resnet18", lambda state: {f"module.{k}": v.double() for k, v in state.items()}),
        ("torchvision.googlenet", heads),
        ("cifar.resnet8", lambda state: {"epoch": 240, "model": state, "accuracy": torch.tensor([59.4])}),
        ("mlp2w16", lambda state: {"net": {f"_orig_mod.{k}": v for k, v in state.items()}, "optimizer": {"lr": 1}}),
    ],
)
def test_a_checkpoint_is_converted_and_imported(folder, network, form):
    architecture = Architecture(network, 5, (3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    images = torch.from_numpy(random_prepared(0, 80, (3, 32, 32)).images).float() / 255
    model = untrained(architecture, images)
    for name in ("train", "validation"):
        write_prepared(folder / f"data/prepared/{name}.h5", known_by(model))
    torch.save(form(model.network.state_dict()), "mine.pt")
    write_params(folder / "params.yaml", {"teacher.network": network, "teacher.weights": "mine.safetensors"})
    said = run("teacher", "convert", "mine.pt", "--network", network).stdout
    assert f"to import it, set teacher.weights: mine.safetensors and teacher.network: {network}" in said
    assert " 5 classes" in said
    assert "train accuracy 100.0%" in run("teacher").stdout
    imported = load_weights(folder / "models/teacher.safetensors")
    assert imported.architecture == architecture
    assert torch.equal(imported.eval()(images), model(images))


def test_what_a_conversion_took_and_left_is_told(folder):
    state = tiny_teacher().network.state_dict()
    ema = {f"module.{name}": tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    others = {f"loss {number}": 0.5 for number in range(6)}
    torch.save({"state_dict": state, "model_ema": ema | {"n_averaged": torch.tensor(3)}} | others, "mine.pt")
    assert "choose one with --entry: model_ema, state_dict" in refusal("teacher", "convert", "mine.pt")
    assert run("teacher", "convert", "mine.pt", "--entry", "model_ema").stdout == (
        "wrote mine.safetensors: 44 tensors of resnet8w2 at entry 'model_ema', 4 classes, 1 channel, "
        "float16 to float32; left out state_dict (44 tensors), model_ema.n_averaged (1 tensor), loss 0, loss 1, loss 2 "
        "and 3 more; to import it, set teacher.weights: mine.safetensors and teacher.network: resnet8w2\n"
    )
    assert "train accuracy 100.0%" in run("teacher").stdout


def test_a_network_of_ones_own_is_found_in_a_checkpoint(folder):
    (folder / "data/code").mkdir(parents=True)
    (folder / "data/code/nets.py").write_text(
        "from torch import nn\n\n"
        "def flat(channels, classes, image_shape):\n"
        "    channels, height, width = image_shape\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, classes))\n"
    )
    torch.save({"model": {"1.weight": torch.rand(4, 64), "1.bias": torch.zeros(4)}}, "mine.pt")
    said = run("teacher", "convert", "mine.pt", "--network", "own.nets.flat").stdout
    assert "2 tensors of own.nets.flat at entry 'model', 4 classes; left out" not in said
    assert "2 tensors of own.nets.flat at entry 'model', 4 classes; to import it" in said


def reordered(place):
    """The tiny teacher with its classes in another order: its n-th output is of class `place[n]`."""
    teacher = tiny_teacher()
    with torch.no_grad():
        for tensor in (teacher.network.linear.weight, teacher.network.linear.bias):
            tensor.copy_(tensor[place].clone())
    return teacher


@pytest.mark.parametrize("place", [[1, 0, 2, 3], [3, 0, 1, 2]])
def test_classes_in_another_order_are_refused_and_put_right(folder, place):
    save_weights(reordered(place), folder / "mine.safetensors")
    (folder / "models").mkdir()
    (folder / "models/teacher.safetensors").write_bytes((folder / "mine.safetensors").read_bytes())
    for stage in ("teacher", "attack"):
        message = refusal(stage)
        moved = sum(number != to for number, to in enumerate(place))
        assert f"{moved} of 4 classes; " in message
        assert "in its own order 100.0%" in message
        for number, to in enumerate(place):
            assert (f"'{CLASS_NAMES[number]}' of '{CLASS_NAMES[to]}'" in message) == (number != to)
    (folder / "classes.txt").write_text("".join(f"{CLASS_NAMES[to]}\n" for to in place))
    run("teacher", "convert", "mine.safetensors", "--classes", "classes.txt", "--out", "right.safetensors")
    write_params(folder / "params.yaml", {"teacher.network": "resnet8w2", "teacher.weights": "right.safetensors"})
    assert "train accuracy 100.0%" in run("teacher").stdout


def test_a_weak_teacher_is_imported_with_a_warning(folder):
    train = random_prepared(0, 400, (1, 8, 8))
    model = untrained(
        Architecture("resnet8w2", 10, (1, 8, 8), (0.5,), (0.25,)), torch.from_numpy(train.images).float() / 255
    )
    known = known_by(model, 400, (1, 8, 8))
    labels = np.where(np.arange(400) % 10 < 2, known.labels, np.random.default_rng(0).integers(0, 10, 400))
    weak = in_memory(known.images, labels, known.class_names, known.mean, known.std)
    for name in ("train", "validation"):
        write_prepared(folder / f"data/prepared/{name}.h5", weak)
    save_weights(model, folder / "mine.safetensors")
    write_params(
        folder / "params.yaml",
        {"teacher.network": "resnet8w2", "teacher.weights": "mine.safetensors", "attack.views": 1, "views.padding": 0},
    )
    accuracy = (known.labels == labels).mean()
    assert 0.25 < accuracy < 0.35
    for stage in ("teacher", "attack"):
        result = run(stage)
        warning = next(line for line in result.stderr.splitlines() if line.startswith("warning: "))
        assert f"the teacher classifies only {accuracy:.1%} of the images correctly (400 images" in warning
        assert "check its normalisation" in warning
    assert "warning" not in run("attack").stderr  # nothing is searched


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("classes", [3, 5, 1000])
def test_other_numbers_of_classes_are_both_named(folder, classes, described):
    architecture = Architecture("resnet8w2", classes, (1, 8, 8), (0.5,), (0.25,))
    save_weights(untrained(architecture, torch.rand(64, 1, 8, 8)), folder / "mine.safetensors")
    if not described:
        save_file(load_file("mine.safetensors"), "mine.safetensors")
    assert f"mine.safetensors: weights of resnet8w2 for {classes} classes, expected 4: " in refusal("teacher")


def test_other_numbers_of_channels_are_both_named(folder):
    architecture = Architecture("resnet8w2", 4, (3, 8, 8), (0.5,) * 3, (0.25,) * 3)
    save_weights(untrained(architecture, torch.rand(64, 3, 8, 8)), folder / "mine.safetensors")
    assert "the teacher normalises 3 channels, the images have 1: set" in refusal("teacher")
    save_file(load_file("mine.safetensors"), "mine.safetensors")
    assert "for images of 3 channels, expected 1: set dataset.channels" in refusal("teacher")


def test_the_file_of_class_names_must_be_there_and_be_text(folder):
    torch.save(tiny_teacher().network.state_dict(), "mine.pt")
    (folder / "names").write_bytes(b"\xff\xfe\x00")
    for name in ("none", "names"):
        message = refusal("teacher", "convert", "mine.pt", "--classes", name)
        assert f"{name}: no readable file of class names: " in message
