"""Several networks computed as one: as each of them alone."""

import pytest
import torch

from pipeline.networks.classifier import Architecture, build, move_to_
from pipeline.networks.predict import accuracies, accuracy
from pipeline.networks.stack import MEMBERS, Stack, members_of, stacks_well
from tests.support.helpers import CPU, random_prepared


def architecture(network="resnet8w2", side=8, channels=1):
    return Architecture(network, 10, (channels, side, side), (0.3,) * channels, (0.4,) * channels)


def members(kind):
    """Networks whose batch norm has seen something."""
    built = []
    for seed in range(MEMBERS):
        torch.manual_seed(seed)
        built.append(build(kind))
        built[-1](torch.rand(16, *kind.image_shape))
    return built


@pytest.mark.parametrize("network", ["resnet8w2", "resnet14w4", "mlp2w16", "mlp1w8"])
@pytest.mark.parametrize("training", [True, False])
def test_a_stack_computes_what_its_members_do(network, training):
    kind = architecture(network, channels=3)
    alone = [each.train(training).double() for each in members(kind)]
    stack = move_to_(Stack(alone).double(), CPU).train(training)
    images = torch.rand(MEMBERS, 12, 3, 8, 8, dtype=torch.float64)
    logits = stack(images)
    assert logits.shape == (MEMBERS, 12, 10)
    for number, each in enumerate(alone):
        torch.testing.assert_close(logits[number], each(images[number]), rtol=0, atol=1e-12)
    (logits * torch.arange(1.0, MEMBERS + 1).view(-1, 1, 1)).sum().backward()
    gradients = dict(stack.network.named_parameters())
    for number, each in enumerate(alone):
        ((number + 1.0) * each(images[number])).sum().backward()
        for name, value in each.network.named_parameters():
            mine = gradients[name].grad.chunk(MEMBERS)[number]
            torch.testing.assert_close(mine, value.grad, rtol=1e-9, atol=1e-9)


def test_a_stack_on_a_cpu_has_its_channels_last():
    stack = move_to_(Stack(members(architecture())), CPU)
    assert stack.network.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not stack.network.layer1[0].conv1.weight.is_contiguous()


def test_the_states_of_a_stack_are_those_of_its_members():
    alone = members(architecture())
    stack = Stack(alone)
    for each, state in zip(alone, stack.states(), strict=True):
        expected = each.network.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    state["conv1.weight"].zero_()  # a copy
    assert stack.network.state_dict()["conv1.weight"].count_nonzero() == stack.network.conv1.weight.numel()


def test_accuracies_are_those_of_the_members():
    data = random_prepared(seed=0, rows=50, classes=10)
    kind = Architecture("resnet8w2", len(data.class_names), data.view_shape, data.mean, data.std)
    alone = members(kind)
    stack = Stack(alone)
    assert accuracies(stack, members_of(stack), data, CPU) == [accuracy(each, data, CPU) for each in alone]
    assert accuracies(alone[0], members_of(alone[0]), data, CPU) == [accuracy(alone[0], data, CPU)]


@pytest.mark.parametrize(
    ("network", "side", "expected"),
    [
        ("resnet8w2", 8, True),
        ("resnet14w4", 32, True),
        ("resnet8", 8, True),
        ("resnet8", 32, False),
        ("mlp2w32", 2, True),
        ("torchvision.resnet18", 8, False),
        ("own.networks.mine", 8, False),
    ],
)
def test_small_networks_of_this_project_are_stacked(network, side, expected):
    assert stacks_well(architecture(network, side)) == expected
