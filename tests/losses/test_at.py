"""Attention transfer against loops from the paper's definition, in float64."""

import numpy as np
import pytest
import torch

from pipeline.losses.at import AtTerm, attention_loss, attention_map
from pipeline.training.batches import Batch
from tests.support.helpers import (
    Counting,
    cross_entropy,
    features_of,
    loss_of,
    random_images,
    random_normal,
    training_student,
    wide_teacher,
)


def map_by_loop(features):
    """Q / |Q| of one sample (C, H, W), with Q the sum of squared channels at each position."""
    channels, height, width = features.shape
    sums = [sum(float(features[c, y, x]) ** 2 for c in range(channels)) for y in range(height) for x in range(width)]
    length = sum(value**2 for value in sums) ** 0.5
    return [value / length if length else 0.0 for value in sums]


def loss_by_loop(student, teacher):
    """Squared differences of maps, mean over samples and positions."""
    squares = []
    for one, other in zip(np.asarray(student), np.asarray(teacher), strict=True):
        squares += [(a - b) ** 2 for a, b in zip(map_by_loop(one), map_by_loop(other), strict=True)]
    return sum(squares) / len(squares)


SHAPES = [((4, 3, 5, 5), (4, 8, 5, 5)), ((1, 1, 2, 7), (1, 1, 2, 7)), ((6, 16, 3, 1), (6, 2, 3, 1))]


@pytest.mark.parametrize(("student", "teacher"), SHAPES)
@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_the_loss_is_that_of_the_paper(student, teacher, size):
    first, second = random_normal(0, *student, size=size), random_normal(1, *teacher)
    expected = loss_by_loop(first, second)
    assert expected > 1e-4
    assert attention_loss(first, second).item() == pytest.approx(expected, rel=1e-5)


def test_maps_have_length_1_and_a_row_for_each_sample():
    features = random_normal(2, 5, 3, 4, 2)
    maps = attention_map(features)
    assert maps.shape == (5, 8)
    np.testing.assert_allclose(maps, [map_by_loop(each) for each in features.numpy()], rtol=1e-5)
    np.testing.assert_allclose(maps.square().sum(1), 1, rtol=1e-6)


def test_the_same_features_lose_nothing_and_neither_do_larger_ones():
    features = random_normal(3, 4, 3, 5, 5)
    assert attention_loss(features, features) == 0
    # Rounding alone: maps of float32 in [0, 1].
    assert attention_loss(7 * features, features).item() < 1e-13
    # Nor does a map depend on the order of channels, or on signs.
    assert attention_loss(-features.flip(1), features).item() < 1e-13


def test_maps_without_overlap_lose_most():
    student, teacher = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    student[0, 0, 0, 0], teacher[0, 0, 1, 1] = 3.0, 0.5
    assert attention_loss(student, teacher).item() == pytest.approx(2 / 4)


@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
def test_features_of_zero_have_a_finite_loss_and_gradient(zero):
    student, teacher = random_normal(4, 3, 2, 4, 4), random_normal(5, 3, 6, 4, 4)
    if zero != "teacher":
        student[1] = 0
    if zero != "student":
        teacher[1] = 0
    loss = attention_loss(student.requires_grad_(), teacher)
    loss.backward()
    assert loss.item() == pytest.approx(loss_by_loop(student.detach(), teacher), rel=1e-5)
    assert torch.isfinite(student.grad).all()
    assert student.grad[0].abs().sum() > 0


def test_the_gradient_is_that_of_the_loss():
    student = random_normal(6, 3, 2, 4, 3, dtype=torch.float64).requires_grad_()
    teacher = random_normal(7, 3, 5, 4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: attention_loss(x, teacher), student)


LAYERS = ["layer1", "layer2", "layer3"]


@pytest.mark.parametrize("layers", [LAYERS, ["layer2"]])
@pytest.mark.parametrize(("epoch", "epochs"), [(0, 1), (7, 9)])
def test_the_term_is_the_sum_over_layers_with_its_weight(layers, epoch, epochs):
    network, teacher = training_student(), wide_teacher()
    student = Counting(network)
    batch = Batch(images=random_images(8, 12), labels=torch.arange(12) % 4)
    given = AtTerm.Parameters(student_layers=layers, teacher_layers=layers, weight=50.0)
    loss = loss_of(student, {"at": given}, batch, epoch, epochs, teacher)
    ours, theirs = features_of(network, batch.images), features_of(teacher, batch.images)
    part = 50 * sum(loss_by_loop(ours[name], theirs[name]) for name in layers)
    (logits,) = student.passes
    assert part > 0.05
    assert loss.item() == pytest.approx(cross_entropy(logits, batch.labels) + part, rel=1e-5)


def test_layers_are_compared_in_pairs():
    # Maps of one size, but each student's layer goes with another layer of the teacher.
    network, teacher = training_student(), wide_teacher()
    batch = Batch(images=random_images(9, 12), labels=torch.arange(12) % 4)
    given = AtTerm.Parameters(student_layers=["conv1", "layer1"], teacher_layers=["layer1", "conv1"], weight=50.0)
    loss = loss_of(network, {"at": given}, batch, teacher=teacher)
    ours, theirs = features_of(network, batch.images), features_of(teacher, batch.images)
    expected = loss_by_loop(ours["conv1"], theirs["layer1"]) + loss_by_loop(ours["layer1"], theirs["conv1"])
    straight = loss_by_loop(ours["conv1"], theirs["conv1"]) + loss_by_loop(ours["layer1"], theirs["layer1"])
    assert expected != pytest.approx(straight, rel=0.01)
    assert (loss - loss_of(network, {}, batch)).item() == pytest.approx(50 * expected, rel=1e-4)


def test_the_gradient_reaches_the_student_and_not_the_teacher():
    teacher = wide_teacher().requires_grad_(True)
    batch = Batch(images=random_images(10, 12), labels=torch.arange(12) % 4)
    given = AtTerm.Parameters(student_layers=["layer2"], teacher_layers=["layer2"], weight=1000.0)
    plain, other = training_student(), training_student()
    loss_of(plain, {}, batch).backward()
    loss_of(other, {"at": given}, batch, teacher=teacher).backward()
    assert not torch.allclose(plain.network.conv1.weight.grad, other.network.conv1.weight.grad, rtol=1e-3)
    # Behind the layer nothing changes.
    torch.testing.assert_close(plain.network.linear.weight.grad, other.network.linear.weight.grad)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.isfinite(parameter.grad).all() for parameter in other.parameters())
