"""Networks as ONNX and as programs of torch: the same logits, from a file alone."""

import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from pipeline.core.errors import StoreError, WeightsError
from pipeline.core.provenance import ROOT
from pipeline.export.program import METADATA, check, export
from pipeline.images.prepared import read_prepared
from pipeline.networks.classifier import Architecture, build
from pipeline.networks.predict import predict
from pipeline.networks.weights import load_weights, save_weights
from tests.support.files import CLASS_NAMES, make_project, run_stage

WEIGHTS = "models/teacher.safetensors"


@pytest.fixture
def project(tmp_path, monkeypatch):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def network(name, shape, classes=5):
    torch.manual_seed(0)
    model = build(Architecture(name, classes, shape, (0.4,) * shape[0], (0.25,) * shape[0]))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.5)  # not what it begins with, or forgetting it would change nothing
    return model.eval()


def images(rows, shape):
    return np.random.default_rng(0).integers(0, 256, (rows, *shape), dtype=np.uint8)


def test_an_onnx_file_gives_the_networks_logits_for_any_number_of_images(project):
    result = run_stage("export", WEIGHTS, "--to", "onnx", "--out", "teacher.onnx")
    assert result.exit_code == 0, result.stderr
    assert "32 of 32 top classes are the same" in result.stdout
    session = onnxruntime.InferenceSession(project / "teacher.onnx")
    known = session.get_modelmeta().custom_metadata_map
    assert json.loads(known["classes"]) == list(CLASS_NAMES)
    assert json.loads(known["image_shape"]) == [1, 8, 8]
    teacher, test = load_weights(project / WEIGHTS), read_prepared(project / "data/prepared/test.h5")
    assert json.loads(known["mean"]) == list(teacher.architecture.mean)
    wanted = predict(teacher, test.images, torch.device("cpu")).numpy()
    for rows in (1, 3, 32):
        pixels = test.images[:rows].astype(np.float32) / 255
        np.testing.assert_allclose(session.run(["logits"], {"pixels": pixels})[0], wanted[:rows], atol=1e-4)


def test_a_program_of_torch_needs_nothing_of_this_project(project):
    result = run_stage("export", WEIGHTS, "--to", "pt2")
    assert result.exit_code == 0, result.stderr
    code = (
        f"import json, sys, torch; more = {{'{METADATA}': ''}}; "
        "program = torch.export.load(sys.argv[1], extra_files=more).module(); "
        "logits = program(torch.full((3, 1, 8, 8), 0.25)); assert 'pipeline' not in sys.modules; "
        "print(json.dumps([json.loads(json.loads(*more.values())['classes']), logits.tolist()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, project / "exported/teacher.pt2"], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    classes, logits = json.loads(done.stdout.splitlines()[-1])
    assert classes == list(CLASS_NAMES)
    with torch.no_grad():
        wanted = load_weights(project / WEIGHTS).eval()(torch.full((3, 1, 8, 8), 0.25))
    np.testing.assert_allclose(logits, wanted.numpy(), atol=1e-5)


def test_the_example_of_use_classifies_pictures_as_the_pipeline_does(project):
    assert run_stage("export", WEIGHTS).exit_code == 0
    test = read_prepared(project / "data/prepared/test.h5")
    for row in range(6):
        Image.fromarray(test.images[row, 0]).save(project / f"{row}.png")
    done = subprocess.run(
        [sys.executable, ROOT / "docs/use_onnx.py", "exported/teacher.onnx", *(f"{row}.png" for row in range(6))],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    predicted = predict(load_weights(project / WEIGHTS), test.images[:6], torch.device("cpu")).argmax(1)
    assert [line.split()[1] for line in done.stdout.splitlines()] == [CLASS_NAMES[number] for number in predicted]


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("onnx", "resnet8", (3, 16, 16)),
        ("onnx", "mlp2w16", (1, 8, 8)),
        ("onnx", "cifar.shufflenetv2", (3, 32, 32)),
        ("onnx", "torchvision.mobilenet_v3_small", (1, 32, 32)),
        ("onnx", "timm.mobilenetv3_small_050", (3, 32, 32)),
        ("pt2", "cifar.resnet8x4", (3, 16, 16)),
        ("pt2", "torchvision.mobilenet_v3_small", (1, 32, 32)),
    ],
)
def test_every_family_of_networks_can_be_exported(tmp_path, kind, name, shape):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    model, path = network(name, shape), tmp_path / f"network.{kind}"
    export(model, [f"class {number}" for number in range(5)], kind, path)
    found = check(path, kind, model, images(9, shape))
    assert (found.images, found.same_class) == (9, 9)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_file_of_another_network_does_not_pass_the_check(tmp_path, kind):
    model, path = network("resnet8w4", (1, 8, 8)), tmp_path / "network"
    export(model, list("abcde"), kind, path)
    model.network.linear.bias.data[2] += 0.1
    with pytest.raises(WeightsError, match=r"its logits differ from those of the network by up to 0.1 on 4 images"):
        check(path, kind, model, images(4, (1, 8, 8)))


def test_what_cannot_be_exported_is_refused_in_one_line_and_leaves_no_file(tmp_path, monkeypatch):
    class Odd(torch.nn.Module):
        def forward(self, pixels):
            return pixels.flatten(1)[:, :5] * (2 if float(pixels.sum()) > 3 else 1)

    model = network("resnet8w4", (1, 8, 8))
    model.network = Odd()
    with pytest.raises(WeightsError, match="resnet8w4: cannot be exported to pt2: ") as caught:
        export(model, list("abcde"), "pt2", tmp_path / "odd.pt2")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(StoreError, match=r"ONNX is not installed: pip install '.\[export\]', or export --to pt2"):
        export(model, list("abcde"), "onnx", tmp_path / "odd.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_network_for_other_images_is_refused(project):
    save_weights(network("resnet8w4", (3, 8, 8), classes=4), project / "other.safetensors")
    result = run_stage("export", "other.safetensors")
    assert result.exit_code == 1
    assert "other.safetensors: a network for images (3, 8, 8) of 4 classes, the prepared data has (1, 8, 8) and 4" in (
        result.stderr
    )
    assert not (project / "exported").exists()
