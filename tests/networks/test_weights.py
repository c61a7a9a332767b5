"""Networks, their weights files, and folding for searches."""

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.core.errors import PipelineWarning, WeightsError
from pipeline.networks import fast
from pipeline.networks.classifier import Architecture, Classifier, build
from pipeline.networks.fast import folded, halved
from pipeline.networks.resnet import BasicBlock
from pipeline.networks.weights import load_weights, save_weights
from tests.support.files import tiny_teacher, truncate
from tests.support.helpers import GRAY, Trap, built, images_for, untrained

COLOUR = Architecture("resnet8w2", 5, (3, 9, 7), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


# He et al. (2016), table 6, in millions, for 3 x 32 x 32 images and 10 classes.
PARAMETERS = [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85), ("resnet110", 1.7)]


@pytest.mark.parametrize(("network", "millions"), PARAMETERS)
def test_networks_have_as_many_parameters_as_in_their_paper(network, millions):
    model = build(Architecture(network, 10, (3, 32, 32), (0.5,) * 3, (0.25,) * 3))
    count = sum(parameter.numel() for parameter in model.parameters())
    digits = 1 if millions == 1.7 else 2
    assert round(count / 1e6, digits) == millions


def test_width_multiplies_the_channels():
    model = build(GRAY._replace(network="resnet14w3"))
    assert [model.network.conv1.out_channels] == [3]
    assert model.network.linear.in_features == 12
    assert [len(group) for group in (model.network.layer1, model.network.layer2, model.network.layer3)] == [2, 2, 2]
    assert build(GRAY._replace(network="resnet8")).network.conv1.out_channels == 16


@pytest.mark.parametrize("architecture", [GRAY, COLOUR])
def test_logits_have_one_column_per_class(architecture):
    assert built(architecture)(images_for(architecture)).shape == (6, architecture.classes)


def test_the_shortcut_has_no_parameters_and_passes_the_image_on():
    block = BasicBlock(2, 4, stride=2).eval()
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"conv1", "bn1", "conv2", "bn2"}
    nn.init.zeros_(block.bn2.weight)  # the residual branch gives nothing
    x = torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    output = block(x)
    assert torch.equal(output[:, :2], x[:, :, ::2, ::2])
    assert not output[:, 2:].any()


@pytest.mark.parametrize("architecture", [GRAY, COLOUR])
def test_normalisation_is_inside_the_classifier(architecture):
    model, images = built(architecture), images_for(architecture)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (architecture.mean, architecture.std))
    torch.testing.assert_close(model(images), model.network((images - mean) / std))
    assert not torch.allclose(model(images), model.network(images))


def test_fresh_weights_follow_from_torchs_seed():
    first, again, other = (built(GRAY, seed)(images_for(GRAY)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


UNKNOWN = [
    "resnet9",
    "resnet2",
    "resnet8w0",
    "resnet",
    "foo",
    "",
    "ResNet8",
    "resnet8w4 ",
    "resnet8\n",
    "../resnet8",
    "mlp",
    "mlp2",
    "mlp0w8",
    "mlp2w0",
    "mlp02w8",
    "mlp2w8 ",
]


@pytest.mark.parametrize("network", UNKNOWN)
def test_unknown_networks_are_refused_with_the_known_names(network):
    with pytest.raises(WeightsError, match=r"resnet<6n\+2>"):
        build(GRAY._replace(network=network))


@pytest.mark.parametrize("architecture", [GRAY, COLOUR])
def test_loading_after_saving_is_the_identity(tmp_path, architecture):
    path = tmp_path / "deep/weights.safetensors"
    model = built(architecture)
    save_weights(model, path)
    loaded = load_weights(path)
    assert loaded.architecture == architecture
    assert torch.equal(loaded.eval()(images_for(architecture)), model(images_for(architecture)))
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_same_weights_are_the_same_bytes(tmp_path):
    paths = [tmp_path / str(number) for number in range(5)]
    for path in paths:
        save_weights(built(GRAY), path)
    save_weights(load_weights(paths[0]), paths[1])
    assert len({path.read_bytes() for path in paths}) == 1


def test_weights_of_a_plain_network_load_with_an_architecture(tmp_path):
    path = tmp_path / "plain.safetensors"
    model = built(GRAY)
    state = {name: tensor for name, tensor in model.network.state_dict().items() if "num_batches" not in name}
    save_file(state, path)
    assert torch.equal(load_weights(path, GRAY).eval()(images_for(GRAY)), model(images_for(GRAY)))
    with pytest.raises(WeightsError, match="no description of its network"):
        load_weights(path)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(built(GRAY), path)
    return path


def refusal(path, architecture=None):
    with pytest.raises(WeightsError) as caught:
        load_weights(path, architecture)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_a_missing_file_is_named(tmp_path):
    assert "no such weights file" in refusal(tmp_path / "none.safetensors")
    assert "a folder: name the weights file in it" in refusal(tmp_path)


@pytest.mark.parametrize("content", [{"weight": torch.zeros(3)}, Trap()], ids=["tensors", "code"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path, content):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    message = refusal(path, GRAY)
    assert "Pickled weights" in message
    assert f"python -m stages.teacher convert {path}" in message


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(saved, kept):
    size = saved.stat().st_size
    truncate(saved, by=1 if kept < 0 else size - kept)
    message = refusal(saved)
    assert ("not a readable safetensors file" if kept else "an empty file") in message
    assert message.endswith(": copy or download it again")


def rewrite(path, tensors=None, metadata=None):
    """Write a saved file again with other tensors (None removes one) or metadata."""
    model = built(GRAY)
    state = {**load_file(path), **(tensors or {})}
    described = {"architecture": json.dumps(model.architecture._asdict() | (metadata or {}))}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path, described)


OTHER_WEIGHTS = [
    ({"linear.bias": None}, "lacks 'linear.bias'"),
    ({"head.weight": torch.zeros(2)}, "has an unknown tensor 'head.weight'"),
    ({"linear.weight": torch.zeros(4, 9)}, r"'linear.weight' has shape (4, 9), expected (4, 8)"),
    ({"conv1.weight": torch.full((2, 1, 3, 3), torch.nan)}, "'conv1.weight' holds values that are not finite"),
    ({"bn1.running_var": torch.full((2,), torch.inf)}, "'bn1.running_var' holds values that are not finite"),
    ({"conv1.weight": torch.zeros(2, 1, 3, 3, dtype=torch.int8)}, "'conv1.weight' holds int8, expected float32"),
    ({"conv1.weight": torch.full((2, 1, 3, 3), 1e300, dtype=torch.float64)}, "holds values that are not finite"),
    (
        {"linear.weight": torch.zeros(9, 8), "linear.bias": torch.zeros(9)},
        "weights of resnet8w2 for 9 classes, expected 4: prepare the dataset",
    ),
    (
        {"conv1.weight": torch.zeros(2, 3, 3, 3)},
        "weights of resnet8w2 for images of 3 channels, expected 1: set dataset.channels",
    ),
]


@pytest.mark.parametrize(("tensors", "expected"), OTHER_WEIGHTS)
def test_weights_that_do_not_fit_are_refused_by_the_tensors_name(saved, tensors, expected):
    rewrite(saved, tensors)
    assert expected in refusal(saved)


def test_a_perceptron_for_images_of_another_size_is_refused(tmp_path):
    path = tmp_path / "mlp.safetensors"
    save_file(build(GRAY._replace(network="mlp1w4")).network.state_dict(), path)
    message = refusal(path, GRAY._replace(network="mlp1w4", image_shape=(1, 9, 7)))
    assert "weights of mlp1w4 for images of another size than 9x7: set dataset.image_size" in message


def test_weights_under_other_names_are_refused_with_the_way_to_find_them(saved):
    save_file({f"model.{name}": tensor for name, tensor in load_file(saved).items()}, saved)
    assert f"python -m stages.teacher convert {saved}" in refusal(saved, GRAY)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_weights_of_other_precision_load_as_float32(saved, kind):
    save_file({name: t.to(kind) if t.is_floating_point() else t for name, t in load_file(saved).items()}, saved)
    model = load_weights(saved, GRAY)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = built(GRAY).network.conv1.weight.to(kind).float()
    assert torch.equal(model.network.conv1.weight, expected)


def test_weights_of_a_deeper_network_are_refused(saved):
    assert "not the weights of resnet14w2: lacks 'layer1.1.bn1.bias'" in refusal(
        saved, GRAY._replace(network="resnet14w2")
    )
    assert "'bn1.bias' has shape (2,), expected (4,)" in refusal(saved, GRAY._replace(network="resnet8w4"))


METADATA = {
    "network unknown": ("network", "vgg"),
    "network null": ("network", None),
    "classes text": ("classes", "four"),
    "classes negative": ("classes", -1),
    "classes infinite": ("classes", 1e400),
    "shape empty": ("image_shape", []),
    "shape short": ("image_shape", [1, 8]),
    "channels negative": ("image_shape", [-1, 8, 8]),
    "width negative": ("image_shape", [1, 8, -8]),
    "mean empty": ("mean", []),
    "mean of more channels": ("mean", [0.4, 0.4]),
    "mean NaN": ("mean", [float("nan")]),
    "deviation zero": ("std", [0.0]),
    "deviation negative": ("std", [-0.3]),
    "deviation no list": ("std", 0.3),
}


@pytest.mark.parametrize("case", METADATA)
def test_a_strangers_nonsense_in_the_metadata_is_refused(saved, case):
    key, value = METADATA[case]
    rewrite(saved, metadata={key: value})
    assert "no usable description of its network in the metadata: " in refusal(saved)


def test_folding_changes_logits_by_rounding_only():
    for model in (built(GRAY), built(COLOUR), tiny_teacher()):
        images = images_for(model.architecture, rows=32)
        fast = folded(model)
        assert not [module for module in fast.modules() if isinstance(module, nn.BatchNorm2d)]
        torch.testing.assert_close(fast(images), model(images), rtol=0, atol=1e-4)
        assert fast.architecture == model.architecture


def test_folding_gives_a_frozen_copy_and_leaves_the_model_as_it_was():
    model = built(GRAY).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    fast = folded(model)
    assert torch.equal(torch.rand(1), expected)  # no draw from the global generator
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not fast.training
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    owned = {parameter.data_ptr() for parameter in model.parameters()}
    assert not owned & {parameter.data_ptr() for parameter in fast.parameters()}


class Untraceable(nn.Module):
    """Takes a branch by the values of its input, which torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(1)
        self.linear = nn.Linear(64, 4)

    def forward(self, x):
        return self.linear(self.bn(-x if x.mean() > 0 else x).flatten(1))


def test_a_network_that_cannot_be_traced_is_copied_as_it_is():
    torch.manual_seed(0)
    model = Classifier(Untraceable(), GRAY._replace(network="own.odd.network"))
    with pytest.warns(
        PipelineWarning, match=r"own.odd.network': its batch norms are not folded, .*TraceError: "
    ) as told:
        copy = folded(model)
    assert [str(each.message).count("\n") for each in told] == [0]
    images = images_for(GRAY)
    assert torch.equal(copy(images), model.eval()(images))
    assert isinstance(copy.network, Untraceable)
    assert copy.network is not model.network
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradients_of_the_folded_copy_are_those_of_the_model():
    model = tiny_teacher()
    gradients = []
    for network in (model, folded(model)):
        images = images_for(GRAY, rows=8).requires_grad_()
        network(images)[:, 1].sum().backward()
        gradients.append(images.grad.numpy())
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


@pytest.fixture
def bfloat16(monkeypatch):
    """As on a machine with instructions for bfloat16."""
    monkeypatch.setattr(fast, "_has_bfloat16", lambda device: True)


def gradient_of(network, images):
    images = images.clone().requires_grad_()
    network(images)[:, 1].sum().backward()
    return images.grad.flatten(1)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("architecture", [GRAY, COLOUR])
def test_a_halved_copy_has_nearly_the_same_logits_and_gradients(architecture):
    model = folded(untrained(architecture, images_for(architecture, rows=64)))
    half = halved(model)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32, torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    images = images_for(architecture, rows=16)
    logits = half(images)
    assert logits.dtype == torch.float32
    assert 0 < (logits - model(images)).norm() < 0.03 * model(images).norm()
    cosine = torch.nn.functional.cosine_similarity(gradient_of(half, images), gradient_of(model, images))
    assert cosine.min() > 0.9


@pytest.mark.usefixtures("bfloat16")
def test_a_halved_copy_sees_perturbations_far_smaller_than_bfloat16_tells_pixels_apart():
    model = folded(untrained(COLOUR, images_for(COLOUR, rows=64))).double()
    images = images_for(COLOUR, rows=16)
    step = 1e-3 * gradient_of(model, images.double()).sign().view_as(images)  # bfloat16 knows 1 and 0.996
    change = (model(images.double() + step) - model(images.double()))[:, 1]
    half = halved(model.float())
    seen = (half(images + step.float()) - half(images))[:, 1]
    assert torch.corrcoef(torch.stack([seen, change.float()]))[0, 1] > 0.8


@pytest.mark.usefixtures("bfloat16")
def test_a_network_that_cannot_be_halved_is_left_as_it_is():
    torch.manual_seed(0)
    with pytest.warns(PipelineWarning):
        untraceable = folded(Classifier(Untraceable(), GRAY))
    with warnings.catch_warnings(action="error"):  # folding has said it
        assert halved(untraceable) is untraceable
    one_layer = folded(Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), GRAY))
    with pytest.warns(
        PipelineWarning, match=r"gradients are in float32, not bfloat16, .*\(TypeError: '0' is no layer\)"
    ):
        assert halved(one_layer) is one_layer


@pytest.mark.usefixtures("bfloat16")
def test_a_fast_copy_that_is_wrong_or_breaks_is_not_taken_and_the_reason_is_told(monkeypatch):
    model = built(GRAY)

    def broken(network):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr("torch.fx.experimental.optimization.fuse", broken)
    with pytest.warns(PipelineWarning, match=r"not folded, .*\(OutOfMemoryError: CUDA out of memory. Tried to"):
        assert isinstance(folded(model).network.bn1, nn.BatchNorm2d)
    monkeypatch.setattr("torch.fx.experimental.optimization.fuse", lambda network: built(GRAY, seed=1).network)
    with pytest.warns(PipelineWarning, match=r"not folded, .*\(logits would be off by \d"):
        copy = folded(model)
    torch.testing.assert_close(copy(images_for(GRAY)), model(images_for(GRAY)), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.filterwarnings("error")
def test_of_what_is_no_fallback_nothing_is_told():
    for architecture in (GRAY, COLOUR):
        halved(folded(built(architecture)))


def test_without_bfloat16_instructions_nothing_is_halved(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    model = folded(built(GRAY))
    assert halved(model) is model
