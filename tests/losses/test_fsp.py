"""Flow of the solution procedure against loops from the paper's definition, in float64."""

import numpy as np
import pytest
import torch

from pipeline.losses.fsp import FspTerm, fsp_loss, fsp_matrix
from pipeline.networks.classifier import Architecture
from pipeline.training.batches import Batch
from pipeline.training.objective import Moment, Objective
from tests.support.helpers import (
    Counting,
    convolved,
    cross_entropy,
    features_of,
    random_images,
    random_normal,
    training_student,
    untrained,
    wide_teacher,
)


def pooled_by_loop(maps, height, width):
    """(C, H, W) to (C, height, width): the maximum over windows that cover all positions, as even as can be."""
    channels, rows, columns = maps.shape
    result = np.empty((channels, height, width))
    for c, y, x in np.ndindex(*result.shape):
        top, bottom = y * rows // height, -(-(y + 1) * rows // height)
        left, right = x * columns // width, -(-(x + 1) * columns // width)
        result[c, y, x] = max(maps[c, i, j] for i in range(top, bottom) for j in range(left, right))
    return result


def matrix_by_loop(first, second):
    """G_ij = sum over positions of F1_i F2_j / (h w), of one sample."""
    height, width = (min(first.shape[axis], second.shape[axis]) for axis in (1, 2))
    first, second = pooled_by_loop(first, height, width), pooled_by_loop(second, height, width)
    result = np.zeros((len(first), len(second)))
    for i, j in np.ndindex(*result.shape):
        for y, x in np.ndindex(height, width):
            result[i, j] += first[i, y, x] * second[j, y, x] / (height * width)
    return result


def loss_by_loop(student, teacher):
    """Of two lists of features (N, C, H, W): squared differences of matrices, mean over entries, samples, pairs."""
    means = []
    for at in range(len(student) - 1):
        squares = []
        for row in range(len(student[0])):
            ours = matrix_by_loop(student[at][row], student[at + 1][row])
            theirs = matrix_by_loop(teacher[at][row], teacher[at + 1][row])
            squares += [(ours[index] - theirs[index]) ** 2 for index in np.ndindex(*ours.shape)]
        means.append(sum(squares) / len(squares))
    return sum(means) / len(means)


SHAPES = [
    ((3, 4, 4, 4), (3, 6, 4, 4)),
    ((2, 3, 8, 8), (2, 5, 4, 4)),
    ((2, 3, 2, 2), (2, 5, 4, 6)),
    ((1, 2, 7, 5), (1, 1, 3, 4)),  # no whole factor
    ((1, 1, 1, 1), (1, 1, 6, 6)),
    ((2, 2, 8, 2), (2, 3, 4, 4)),  # one is higher, the other wider
]


@pytest.mark.parametrize(("first", "second"), SHAPES)
def test_matrices_are_those_of_the_paper(first, second):
    one, other = random_normal(0, *first), random_normal(1, *second)
    result = fsp_matrix(one, other)
    assert result.shape == (first[0], first[1], second[1])
    expected = [matrix_by_loop(a, b) for a, b in zip(one.double().numpy(), other.double().numpy(), strict=True)]
    # Sums of products that may cancel: as exact as float32 is for products of order 1.
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("first", "second"), SHAPES)
def test_the_loss_is_the_mean_squared_difference(first, second):
    parts = [random_normal(seed, *shape) for seed, shape in enumerate([first, second, first, second])]
    loss = fsp_loss(fsp_matrix(*parts[:2]), fsp_matrix(*parts[2:]))
    doubles = [part.double().numpy() for part in parts]
    assert loss.item() == pytest.approx(loss_by_loop(doubles[:2], doubles[2:]), rel=1e-5)


def test_the_same_features_lose_nothing():
    one, other = random_normal(0, 3, 4, 6, 6), random_normal(1, 3, 5, 3, 3)
    assert fsp_loss(fsp_matrix(one, other), fsp_matrix(one, other)) == 0


def test_features_of_zero_have_a_finite_loss_and_gradient():
    one, other = torch.zeros(2, 3, 4, 4, requires_grad=True), random_normal(1, 2, 5, 2, 2)
    loss = fsp_loss(fsp_matrix(one, other), torch.ones(2, 3, 5))
    loss.backward()
    assert loss == 1
    assert torch.isfinite(one.grad).all()
    assert one.grad.abs().sum() > 0
    nothing = torch.zeros(2, 3, 4, 4, requires_grad=True)
    fsp_loss(fsp_matrix(nothing, nothing), torch.ones(2, 3, 3)).backward()
    assert (nothing.grad == 0).all()


def test_the_gradient_is_that_of_the_loss():
    one = random_normal(2, 2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    other = random_normal(3, 2, 2, 2, 2, dtype=torch.float64).requires_grad_()
    target = random_normal(4, 2, 3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: fsp_loss(fsp_matrix(a, b), target), (one, other))


def objective_of(student, teacher, layers, weight=3.0):
    given = FspTerm.Parameters(student_layers=list(layers), teacher_layers=list(layers), first_stage=0.5, weight=weight)
    return Objective(student, {"fsp": given}, teacher)


@pytest.mark.parametrize("layers", [("layer1", "layer2", "layer3"), ("layer1", "layer3")])
def test_the_first_stage_minimises_the_flow_alone_with_its_weight(layers):
    student, teacher = training_student(), wide_teacher()
    objective = objective_of(student, teacher, layers)
    batch = Batch(images=random_images(6, 6), labels=torch.arange(6) % 4)
    ours, theirs = features_of(student, batch.images), features_of(teacher, batch.images)
    connected = [
        convolved(layer, ours[name]) for layer, name in zip(objective.terms[0].connectors, layers, strict=True)
    ]
    expected = 3 * loss_by_loop(connected, [theirs[name] for name in layers])
    assert expected > 0.05
    for epoch in (0, 2):
        assert objective.loss(student, batch, Moment(True, epoch, 3)).item() == pytest.approx(expected, rel=1e-5)


def test_networks_of_one_width_are_compared_as_they_are():
    student = training_student()
    architecture = Architecture("resnet14w2", 4, (1, 8, 8), (0.5,), (0.25,))
    teacher = untrained(architecture, random_images(51, 256), 51)
    layers = ("layer1", "layer2", "layer3")
    objective = objective_of(student, teacher, layers)
    assert list(objective.terms.parameters()) == []
    batch = Batch(images=random_images(7, 6), labels=torch.arange(6) % 4)
    ours, theirs = features_of(student, batch.images), features_of(teacher, batch.images)
    expected = 3 * loss_by_loop([ours[name] for name in layers], [theirs[name] for name in layers])
    assert objective.loss(student, batch, Moment(True, 0, 2)).item() == pytest.approx(expected, rel=1e-5)


def test_the_second_stage_goes_without_flow():
    network = training_student()
    student = Counting(network)
    batch = Batch(images=random_images(8, 12), labels=torch.arange(12) % 4)
    loss = objective_of(network, wide_teacher(), ("layer1", "layer2")).loss(student, batch, Moment(False, 0, 2))
    assert loss.item() == pytest.approx(cross_entropy(student.passes[0], batch.labels), rel=1e-5)


def test_the_gradient_reaches_connectors_and_the_student_and_not_the_teacher():
    student, teacher = training_student(), wide_teacher()
    teacher.requires_grad_(True)
    objective = objective_of(student, teacher, ("layer1", "layer2"))
    objective.loss(
        student, Batch(images=random_images(9, 12), labels=torch.arange(12) % 4), Moment(True, 0, 2)
    ).backward()
    for parameter in (*objective.terms.parameters(), student.network.conv1.weight):
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())
