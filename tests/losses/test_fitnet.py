"""Hints against loops from the paper's definition, in float64."""

import numpy as np
import pytest
import torch

from pipeline.losses.fitnet import FitNetTerm, hint_loss
from pipeline.training.batches import Batch, TeacherBatch
from pipeline.training.objective import Moment, Objective
from tests.support.helpers import (
    Counting,
    convolved,
    cross_entropy,
    features_of,
    hinton_parameters,
    loss_of,
    random_images,
    random_normal,
    softened,
    training_student,
    wide_teacher,
)


def hint_by_loop(guided, hint):
    """Half the squared error, mean over all elements."""
    guided, hint = np.asarray(guided, np.float64), np.asarray(hint, np.float64)
    assert guided.shape == hint.shape
    total = 0.0
    for index in np.ndindex(*hint.shape):
        total += 0.5 * (guided[index] - hint[index]) ** 2
    return total / hint.size


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (1, 1, 1, 1), (2, 16, 3, 7)])
def test_the_loss_is_that_of_the_paper_per_element(shape):
    guided, hint = random_normal(0, *shape, size=3.0), random_normal(1, *shape)
    assert hint_loss(guided, hint).item() == pytest.approx(hint_by_loop(guided, hint), rel=1e-5)


def test_the_same_features_lose_nothing():
    features = random_normal(2, 3, 4, 5, 5)
    assert hint_loss(features, features) == 0
    assert hint_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)) == 0


def test_features_of_zero_have_a_finite_loss_and_gradient():
    guided, hint = torch.zeros(2, 3, 4, 4, requires_grad=True), random_normal(3, 2, 3, 4, 4)
    hint_loss(guided, hint).backward()
    np.testing.assert_allclose(guided.grad, -hint / hint.numel(), rtol=1e-6)


def test_the_gradient_is_that_of_the_loss():
    guided = random_normal(4, 2, 3, 4, 3, dtype=torch.float64).requires_grad_()
    hint = random_normal(5, 2, 3, 4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: hint_loss(x, hint), guided)


def objective_of(student, teacher, layers=("layer2",), **losses):
    given = FitNetTerm.Parameters(student_layers=list(layers), teacher_layers=list(layers), first_stage=0.25)
    return Objective(student, {"fitnet": given} | losses, teacher)


@pytest.mark.parametrize("layers", [("layer2",), ("layer1", "layer3")])
def test_the_first_stage_minimises_the_hints_alone(layers):
    student, teacher = training_student(), wide_teacher()
    objective = objective_of(student, teacher, layers, hinton=hinton_parameters())
    regressors = objective.terms[0].regressors
    # From 2, 4, 8 channels to 4, 8, 16.
    widths = {"layer1": (2, 4), "layer2": (4, 8), "layer3": (8, 16)}
    assert [(layer.in_channels, layer.out_channels) for layer in regressors] == [widths[name] for name in layers]
    batch = TeacherBatch(
        images=random_images(6, 12), labels=torch.arange(12) % 4, teacher_logits=random_normal(7, 12, 4)
    )
    ours, theirs = features_of(student, batch.images), features_of(teacher, batch.images)
    expected = sum(
        hint_by_loop(convolved(regressor, ours[name]), theirs[name])
        for regressor, name in zip(regressors, layers, strict=True)
    )
    assert expected > 0.05
    for epoch in (0, 2):
        loss = objective.loss(student, batch, Moment(True, epoch, 3))
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_second_stage_goes_without_hints():
    network, teacher = training_student(), wide_teacher()
    student = Counting(network)
    objective = objective_of(network, teacher, hinton=hinton_parameters())
    batch = TeacherBatch(
        images=random_images(6, 12), labels=torch.arange(12) % 4, teacher_logits=random_normal(7, 12, 4)
    )
    loss = objective.loss(student, batch, Moment(False, 3, 6))
    (logits,) = student.passes
    expected = cross_entropy(logits, batch.labels) + 2.5 * softened(logits, batch.teacher_logits, 3.0).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert loss == loss_of(network, {"hinton": hinton_parameters()}, batch, 3, 6)


def test_the_gradient_reaches_regressors_and_the_student_and_not_the_teacher():
    student, teacher = training_student(), wide_teacher()
    teacher.requires_grad_(True)
    objective = objective_of(student, teacher)
    batch = Batch(images=random_images(8, 12), labels=torch.arange(12) % 4)
    objective.loss(student, batch, Moment(True, 0, 2)).backward()
    for parameter in (*objective.terms.parameters(), student.network.conv1.weight):
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_without_a_first_stage_the_hints_are_in_the_sum_with_their_weight():
    network, teacher = training_student(), wide_teacher()
    given = FitNetTerm.Parameters(student_layers=["layer2"], teacher_layers=["layer2"], first_stage=0, weight=200)
    objective = Objective(network, {"fitnet": given}, teacher)
    assert objective.moment(0, 8) == Moment(False, 0, 8)
    (regressor,) = objective.terms[0].regressors
    student = Counting(network)
    batch = Batch(images=random_images(6, 12), labels=torch.arange(12) % 4)
    loss = objective.loss(student, batch, objective.moment(7, 8))
    ours, theirs = (features_of(each, batch.images)["layer2"] for each in (network, teacher))
    hints = hint_by_loop(convolved(regressor, ours), theirs)
    expected = cross_entropy(student.passes[0], batch.labels) + 200 * hints
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    for parameter in (*objective.terms.parameters(), network.network.conv1.weight, network.network.linear.weight):
        assert parameter.grad.abs().sum() > 0
