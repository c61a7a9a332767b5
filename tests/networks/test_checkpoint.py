"""Checkpoints as other programs write them, and files that are none."""

import argparse
import json
import tarfile
import warnings
from collections import OrderedDict

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pipeline.core.errors import WeightsError
from pipeline.networks.checkpoint import convert_checkpoint
from pipeline.networks.classifier import Architecture, bare_network
from pipeline.networks.weights import load_weights, save_weights
from tests.support.files import truncate
from tests.support.helpers import GRAY, Trap, built, images_for

COLOUR = Architecture("torchvision.googlenet", 5, (3, 64, 64), (0.5,) * 3, (0.25,) * 3)


def states(*seeds, architecture=GRAY):
    return [built(architecture, seed).network.state_dict() for seed in seeds]


def begun(beginning, state):
    return {beginning + name: tensor for name, tensor in state.items()}


def convert(content, tmp_path, network=GRAY.network, **options):
    """What a checkpoint is converted to, as told and as tensors."""
    torch.save(content, tmp_path / "teacher.pt")
    found = convert_checkpoint(tmp_path / "teacher.pt", tmp_path / "teacher.safetensors", network, **options)
    return found, load_file(tmp_path / "teacher.safetensors")


def refusal(content, tmp_path, network=GRAY.network, **options):
    with pytest.raises(WeightsError) as caught:
        convert(content, tmp_path, network, **options)
    return one_line_of(caught, tmp_path)


def one_line_of(caught, tmp_path):
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "teacher.safetensors").exists()
    return str(caught.value)


def trained(model):
    """The optimizer of a network that was trained for a step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(images_for(GRAY)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def averaged(state):
    network = bare_network(GRAY)
    network.load_state_dict(state)
    return AveragedModel(network).state_dict()


# What programs make of a state dict: the checkpoint, the entry, and what is left out.
FORMS = {
    "plain": lambda s: (s, "", []),
    "ordered": lambda s: (OrderedDict(s), "", []),
    "nested": lambda s: ({"epoch": 3, "state_dict": s, "best": 0.9}, "state_dict", ["epoch", "best"]),
    "parallel": lambda s: ({"net": begun("module.", s), "acc": 92.5}, "net", ["acc"]),
    "compiled": lambda s: (begun("_orig_mod.", s), "", []),
    "compiled and parallel": lambda s: (begun("_orig_mod.module.", s), "", []),
    "parallel and compiled": lambda s: (begun("module._orig_mod.", s), "", []),
    "parts compiled": lambda s: ({name.replace("layer1.", "layer1._orig_mod."): t for name, t in s.items()}, "", []),
    "averaged": lambda s: (averaged(s), "", ["n_averaged (1 tensor)"]),
    "averaged in a list": lambda s: ({"models": [averaged(s)]}, "models.0", ["models.0.n_averaged (1 tensor)"]),
    "Lightning": lambda s: (
        {
            "state_dict": {"loss.w": torch.ones(4), "model.criterion.w": torch.ones(3), **begun("model._orig_mod.", s)},
            "hyper_parameters": {"lr": 0.1, "steps": [1, 2]},
            "callbacks": {},
            "loops": None,
        },
        "state_dict.model",
        ["state_dict.loss (1 tensor)", "state_dict.model.criterion (1 tensor)", "hyper_parameters", "loops"],
    ),
    "with its optimizer": lambda s: (
        {"optimizer": trained(built(GRAY).train()), "model": s}, "model", ["optimizer (23 tensors)"],
    ),
    "without counters": lambda s: ({name: s[name] for name in s if not name.endswith("tracked")}, "", []),
    "with counters of operations": lambda s: (
        s | {"layer1.0.total_ops": torch.tensor([9.0])}, "", ["layer1 (1 tensor)"],
    ),
    "twice the same": lambda s: ({"best": s, "last": dict(s)}, "best", ["last (44 tensors)"]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_found_wherever_they_are(tmp_path, form):
    model = built(GRAY)
    content, entry, left_out = FORMS[form](model.network.state_dict())
    found, tensors = convert(content, tmp_path)
    assert (found.entry, found.classes, found.channels, found.left_out) == (entry, 4, 1, left_out)
    assert found.tensors == len(tensors) == (37 if form == "without counters" else 44)
    images = images_for(GRAY)
    assert torch.equal(load_weights(tmp_path / "teacher.safetensors", GRAY).eval()(images), model(images))


SEVERAL = {
    "timm": (lambda one, two: {"state_dict": one, "state_dict_ema": two}, "state_dict, state_dict_ema"),
    "EMA within": (lambda one, two: {**one, "ema": begun("module.", two)}, "., ema"),
    "student and teacher": (
        lambda one, two: {"state_dict": begun("student.", one) | begun("teacher._orig_mod.", two)},
        "state_dict.student, state_dict.teacher",
    ),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_of_several_weights_one_is_chosen_by_its_entry(tmp_path, case):
    join, listed = SEVERAL[case]
    one, two = states(0, 1)
    assert refusal(join(one, two), tmp_path).endswith(f"choose one with --entry: {listed}")
    message = refusal(join(one, two), tmp_path, entry="eam")
    assert f"no weights of resnet8w2 at entry 'eam'; those of resnet8w2 are at: {listed}" in message
    for entry, state in zip(listed.split(", "), (one, two), strict=True):
        found, tensors = convert(join(one, two), tmp_path, entry=entry)
        assert found.entry == entry.strip(".")
        assert torch.equal(tensors["conv1.weight"], state["conv1.weight"])
        assert len(found.left_out) == (1 if case != "EMA within" or entry == "." else 6)
        (tmp_path / "teacher.safetensors").unlink()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precision_becomes_float32(tmp_path, kind):
    (state,) = states(0)
    found, tensors = convert({n: t.to(kind) if t.is_floating_point() else t for n, t in state.items()}, tmp_path)
    assert found.cast == [str(kind).removeprefix("torch.")]
    assert torch.equal(tensors["linear.weight"], state["linear.weight"].to(kind).float())
    assert tensors["linear.weight"].dtype == torch.float32
    assert tensors["bn1.num_batches_tracked"].dtype == torch.int64


# Networks with more or fewer classes and channels than one would guess; the last one for images of one size only.
NETWORKS = [
    (GRAY, 4, 1),
    (Architecture("resnet14w2", 100, (3, 8, 8), (0.5,) * 3, (0.25,) * 3), 100, 3),
    (COLOUR._replace(network="torchvision.resnet18"), 5, None),
    (COLOUR, 5, None),
    (Architecture("timm.test_convnext", 3, (1, 64, 64), (0.5,), (0.25,)), 3, 1),
    (GRAY._replace(network="mlp2w8", classes=2), 2, None),
]


@pytest.mark.parametrize(("architecture", "classes", "channels"), NETWORKS)
def test_classes_and_channels_are_told_by_the_tensors(tmp_path, architecture, classes, channels):
    state = bare_network(architecture).state_dict()
    found, tensors = convert({"state_dict": begun("module.", state)}, tmp_path, architecture.network)
    assert (found.tensors, found.classes, found.channels) == (len(state), classes, channels)
    assert load_weights(tmp_path / "teacher.safetensors", architecture).architecture == architecture
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(("name", "parts"), [("googlenet", ["aux1", "aux2"]), ("inception_v3", ["AuxLogits"])])
def test_auxiliary_heads_are_left_out(tmp_path, name, parts):
    from torchvision.models import get_model

    with torch.device("meta"):
        whole = get_model(name, weights=None, num_classes=5, aux_logits=True, init_weights=False)
    state = whole.to_empty(device="cpu").state_dict()
    state = {name: torch.rand(t.shape) if t.is_floating_point() else torch.zeros_like(t) for name, t in state.items()}
    found, tensors = convert(state, tmp_path, f"torchvision.{name}")
    assert [each.split(" ")[0] for each in found.left_out] == parts
    assert not [name for name in tensors if name.startswith(tuple(parts))]
    shape = (3, 64, 64) if name == "googlenet" else (3, 96, 96)
    loaded = load_weights(
        tmp_path / "teacher.safetensors", COLOUR._replace(network=f"torchvision.{name}", image_shape=shape)
    )
    assert all(torch.equal(t, state[name]) for name, t in loaded.network.state_dict().items())


def without(state, name):
    return {each: tensor for each, tensor in state.items() if each != name}


OTHERS = {
    "a deeper network": (
        lambda s: states(0, architecture=GRAY._replace(network="resnet14w2"))[0],
        "nearest is entry '.', with 37 of 37 names: it has 'layer1.1.conv1.weight', which resnet8w2 has not",
    ),
    "one more group": (lambda s: s | {"layer4.0.conv1.weight": torch.ones(2)}, "it has 'layer4.0.conv1.weight'"),
    "one more bias": (lambda s: s | {"conv1.bias": torch.ones(2)}, "it has 'conv1.bias', which resnet8w2 has not"),
    "a wider network": (
        lambda s: {"net": states(0, architecture=GRAY._replace(network="resnet8w4"))[0]},
        "nearest is entry 'net', with 37 of 37 names: it is no match: 'bn1.bias' has shape (4,), expected (2,)",
    ),
    "a tensor missing": (lambda s: without(s, "linear.bias"), "with 36 of 37 names: it lacks 'linear.bias'"),
    "other names": (
        lambda s: {"fc.weight": s["linear.weight"], "epoch": 3},
        "no tensor in it has a name of resnet8w2; it has 'fc.weight'",
    ),
    "no tensors": (lambda s: {"epoch": 3}, "it has no tensors at all"),
    "a list": (lambda s: [1, 2], "it has no tensors at all"),
    "nothing finite": (lambda s: s | {"linear.bias": torch.full((4,), torch.nan)}, "'linear.bias' holds values that"),
    "sparse": (lambda s: s | {"linear.weight": s["linear.weight"].to_sparse()}, "'linear.weight' is not plain (sparse"),
    "no values": (lambda s: s | {"linear.bias": torch.ones(4, device="meta")}, "has a shape, but no values"),
    "quantised": (
        lambda s: s | {"linear.weight": torch.quantize_per_tensor(s["linear.weight"], 0.1, 0, torch.qint8)},
        "'linear.weight' holds qint8, expected float32: quantised weights are not read",
    ),
    "integers": (lambda s: s | {"linear.weight": s["linear.weight"].to(torch.int8)}, "holds int8, expected float32"),
    "one class": (
        lambda s: s | {"linear.weight": s["linear.weight"][:1], "linear.bias": s["linear.bias"][:1]},
        "weights of resnet8w2 for 1 class: at least 2 are needed",
    ),
    "classes at odds": (lambda s: s | {"linear.bias": torch.ones(7)}, "'linear.weight' has shape (4, 8), expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_what_holds_no_weights_of_the_network_is_refused_with_the_reason(tmp_path, case):
    change, expected = OTHERS[case]
    message = refusal(change(*states(0)), tmp_path)
    assert expected in message
    assert message.startswith(f"{tmp_path / 'teacher.pt'}: ")


def test_a_perceptron_is_not_taken_for_a_shallower_one(tmp_path):
    (state,) = states(0, architecture=GRAY._replace(network="mlp2w8"))
    assert "has 'layer2.0.weight', which mlp1w8 has not" in refusal(state, tmp_path, "mlp1w8")


def test_tensors_that_share_memory_or_are_views_are_written_whole(tmp_path):
    (state,) = states(0)
    weight = state["linear.weight"]
    shared = torch.cat([weight.T.reshape(-1), state["linear.bias"]])
    state |= {"linear.weight": shared[:32].view(8, 4).T, "linear.bias": shared[32:]}
    _, tensors = convert({"net": state}, tmp_path)
    assert torch.equal(tensors["linear.weight"], weight)
    assert (tmp_path / "teacher.safetensors").stat().st_size < 20_000


def test_a_checkpoint_that_holds_itself_is_read_once(tmp_path):
    content = {"net": states(0)[0]}
    content["self"] = content
    assert convert(content, tmp_path)[0].entry == "net"


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_from_a_gpu_and_of_old_versions_are_read(tmp_path, zipped, monkeypatch):
    (state,) = states(0)
    # Tensors are saved with the place where they lay.
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    torch.save(state, tmp_path / "gpu.pt", _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    assert b"cuda:3" in (tmp_path / "gpu.pt").read_bytes()
    convert_checkpoint(tmp_path / "gpu.pt", tmp_path / "gpu.safetensors", "resnet8w2")
    assert torch.equal(load_file(tmp_path / "gpu.safetensors")["conv1.weight"], state["conv1.weight"])


@pytest.mark.parametrize("of_numpy_1", [False, True])
def test_numbers_of_numpy_are_left_out(tmp_path, of_numpy_1):
    (state,) = states(0)
    content = {"best": np.float64(0.9), "counts": [np.int64(3), np.float32(2), np.bool_(True)], "net": state}
    torch.save(content, tmp_path / "teacher.pt", _use_new_zipfile_serialization=not of_numpy_1)
    if of_numpy_1:
        data = (tmp_path / "teacher.pt").read_bytes()
        assert b"cnumpy._core.multiarray\n" in data
        (tmp_path / "teacher.pt").write_bytes(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    found = convert_checkpoint(tmp_path / "teacher.pt", tmp_path / "teacher.safetensors", "resnet8w2")
    assert (found.entry, found.left_out) == ("net", ["best", "counts"])
    assert torch.equal(load_file(tmp_path / "teacher.safetensors")["conv1.weight"], state["conv1.weight"])


def whole_model():
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU())


OBJECTS = {
    "code": (Trap, "_pytest.outcomes._Fail"),
    "a whole model": (whole_model, "torch.nn.modules.activation.ReLU, torch.nn.modules.container.Sequential"),
    "arguments": (lambda: {"args": argparse.Namespace(lr=0.1), "net": states(0)[0]}, "argparse.Namespace; where"),
    "NumPy arrays": (lambda: {"mean": np.zeros(3), "net": states(0)[0]}, "arrays of NumPy; where"),
    "NumPy arrays and numbers": (
        lambda: {"mean": np.zeros(3), "args": argparse.Namespace(best=np.float64(0.9))},
        "argparse.Namespace, arrays of NumPy; where",
    ),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("case", OBJECTS)
def test_objects_are_not_loaded_but_named(tmp_path, case, zipped):
    make, expected = OBJECTS[case]
    path = tmp_path / "teacher.pt"
    torch.save(make(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError) as caught:
        convert_checkpoint(path, tmp_path / "teacher.safetensors", "resnet8w2")
    message = one_line_of(caught, tmp_path)
    assert message.startswith(f"{path}: holds objects, which could run code and are not loaded: ")
    assert message.endswith("torch.save(model.state_dict(), NEW), with nothing beside it but plain numbers")
    if zipped:  # of older files, torch tells the first object only
        assert expected in message


def write_script(path):
    torch.jit.save(torch.jit.trace(whole_model(), torch.zeros(1, 2)), path)


def write_program(path):
    torch.export.save(torch.export.export(whole_model(), (torch.zeros(1, 2),)), path.with_suffix(".pt2"))
    path.with_suffix(".pt2").rename(path)


def write_cut(path):
    torch.save(states(0)[0], path)
    truncate(path, by=100)


def write_cut_pickle(path):
    torch.save(states(0)[0], path, _use_new_zipfile_serialization=False)
    truncate(path, by=100)


def write_cut_safetensors(path):
    save_file(states(0)[0], path)
    truncate(path, by=1)


def write_tar(path):
    with tarfile.open(path, "w") as archive:
        archive.add(__file__)


def write_keras(path):
    with h5py.File(path, "w") as file:
        file["kernel"] = np.zeros(3)


def write_arrays(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))


FILES = {
    "nothing": (lambda path: path.write_bytes(b""), "an empty file: copy or download it again"),
    "a pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "a pointer of Git LFS, not the file itself: fetch it with: git lfs pull",
    ),
    "a page": (lambda path: path.write_text("\n<!DOCTYPE html><html></html>"), "a web page, not the file itself"),
    "ONNX": (lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0"), "an ONNX graph"),
    "Keras": (write_keras, "an HDF5 file"),
    "arrays": (write_arrays, "arrays of NumPy (.npz)"),
    "one array": (lambda path: np.save(open(path, "wb"), np.zeros(3)), "a NumPy array (.npy)"),  # noqa: SIM115
    "TorchScript": (write_script, "a TorchScript archive, which is code"),
    "an exported program": (write_program, "a program of torch.export (.pt2)"),
    "a tar archive": (write_tar, "a tar archive: unpack it"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08"), "packed with gzip: unpack it"),
    "cut off": (write_cut, "an archive that is cut off or damaged: copy or download it again"),
    "a folder": (lambda path: path.mkdir(), "a folder: name the weights file in it"),
}
ONLY_CONVERTED = {
    "missing": (lambda path: None, "no such weights file"),
    "text": (lambda path: path.write_text("weights\n"), "neither a checkpoint of torch nor of safetensors ("),
    "cut off pickle": (write_cut_pickle, "cannot be loaded as tensors alone ("),
    "cut off safetensors": (write_cut_safetensors, "neither a checkpoint of torch nor of safetensors ("),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", FILES | ONLY_CONVERTED)
def test_what_is_no_checkpoint_is_named(tmp_path, case):
    write, expected = (FILES | ONLY_CONVERTED)[case]
    path = tmp_path / "teacher.pt"
    write(path)
    with warnings.catch_warnings(action="error"), pytest.raises(WeightsError) as caught:
        convert_checkpoint(path, tmp_path / "teacher.safetensors", "resnet8w2")
    assert f"{path}: {expected}" in one_line_of(caught, tmp_path)
    if case not in FILES:
        return
    with pytest.raises(WeightsError) as caught:
        load_weights(path, GRAY)
    assert f"{path}: {expected}" in one_line_of(caught, tmp_path)


def write_list(directory, files):
    """Several safetensors files with a list of them, as large models are published."""
    for name, state in files.items():
        save_file(state, directory / name, {"format": "pt"})
    names = {tensor: name for name, state in files.items() for tensor in state}
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return path


def test_a_list_of_files_is_read_as_one(tmp_path):
    (state,) = states(0)
    first, last = (dict(sorted(begun("model.", state).items())[part]) for part in (slice(20), slice(20, None)))
    path = write_list(tmp_path, {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": last})
    with pytest.raises(WeightsError, match="a list of other files: make one of them"):
        load_weights(path, GRAY)
    found = convert_checkpoint(path, tmp_path / "teacher.safetensors", "resnet8w2")
    assert (found.entry, found.tensors) == ("model", 44)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00002.safetensors: no such weights file"):
        convert_checkpoint(path, tmp_path / "other", "resnet8w2")


@pytest.mark.parametrize("names", [["../a.safetensors"], ["model.safetensors.index.json"], None, 3])
def test_a_list_of_what_is_not_there_is_refused(tmp_path, names):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": dict(enumerate(names)) if isinstance(names, list) else names}))
    with pytest.raises(WeightsError, match=r"names what is no checkpoint beside it|no list of checkpoints"):
        convert_checkpoint(path, tmp_path / "teacher.safetensors", "resnet8w2")


def test_safetensors_of_other_programs_are_converted(tmp_path):
    (state,) = states(0)
    save_file(begun("model.", state), tmp_path / "given", {"format": "pt", "architecture": "resnet_8"})
    assert convert_checkpoint(tmp_path / "given", tmp_path / "new", "resnet8w2").entry == "model"
    assert torch.equal(load_weights(tmp_path / "new", GRAY).network.linear.weight, state["linear.weight"])


NAMES = ["cat", "dog", "frog", "bird"]


@pytest.mark.parametrize("wanted", [["bird", "cat", "dog", "frog"], ["frog", "cat"]])
def test_classes_are_put_in_another_order_or_picked_by_their_names(tmp_path, wanted):
    model = built(GRAY)
    save_weights(model, tmp_path / "given.safetensors")
    found = convert_checkpoint(tmp_path / "given.safetensors", tmp_path / "new", "resnet8w2", order=(NAMES, wanted))
    assert found.classes == len(wanted)
    images = images_for(GRAY)
    expected = model(images)[:, [NAMES.index(name) for name in wanted]]
    new = load_weights(tmp_path / "new")  # its description is kept
    assert new.architecture == GRAY._replace(classes=len(wanted))
    torch.testing.assert_close(new.eval()(images), expected)


ORDERS = [
    (NAMES[:3], NAMES[:3], "weights for 4 classes, the file of their names has 3"),
    ([*NAMES[:3], "cat"], NAMES[:3], "the file of class names has 'cat' 2 times"),
    (NAMES, [*NAMES[:3], "Frog"], "the file of class names lacks 'Frog', a class of the prepared data"),
]


@pytest.mark.parametrize(("given", "wanted", "expected"), ORDERS)
def test_names_that_are_not_those_of_the_weights_are_refused(tmp_path, given, wanted, expected):
    assert expected in refusal(states(0)[0], tmp_path, order=(given, wanted))


def test_an_existing_file_is_not_overwritten_by_a_conversion(tmp_path):
    torch.save(states(0)[0], tmp_path / "teacher.pt")
    (tmp_path / "teacher.safetensors").write_text("mine")
    with pytest.raises(WeightsError, match="is there already"):
        convert_checkpoint(tmp_path / "teacher.pt", tmp_path / "teacher.safetensors", "resnet8w2")
    assert (tmp_path / "teacher.safetensors").read_text() == "mine"


def test_a_network_that_does_not_exist_is_refused(tmp_path):
    assert "torchvision has no classifier 'resnet19'" in refusal(states(0)[0], tmp_path, "torchvision.resnet19")
