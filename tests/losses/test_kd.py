"""Distillation with constant weight, against loops in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.losses.hinton import HintonTerm, softened_cross_entropy
from pipeline.losses.kd import KdTerm, softened_divergence, standardised
from tests.support.helpers import Counting, cross_entropy, loss_of, random_batch, random_logits, training_student


def by_loop(student, teacher, temperature):
    """T^2 sum_c q_c log(q_c / p_c) of each sample."""
    losses = []
    for ours, theirs in zip(np.asarray(student), np.asarray(teacher), strict=True):
        p, q = ([math.exp(float(value) / temperature) for value in row] for row in (ours, theirs))
        p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
        losses.append(temperature**2 * sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)))
    return np.array(losses)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_it_is_the_divergence_of_softened_outputs_times_the_square_of_the_temperature(temperature):
    student, teacher = random_logits(0), random_logits(1)
    expected = by_loop(student, teacher, temperature)
    assert expected.max() > 0.1
    np.testing.assert_allclose(softened_divergence(student, teacher, temperature), expected, rtol=1e-4, atol=1e-5)


def test_extreme_logits_have_a_finite_loss_and_gradient():
    student = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    loss = softened_divergence(student, torch.tensor([[-1e4, 0.0, 1e4]]), 1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(2e4)
    assert torch.isfinite(student.grad).all()


def test_it_has_the_gradient_of_the_softened_cross_entropy_times_the_square_of_the_temperature():
    teacher, gradients = random_logits(1).double(), []
    for function, factor in ((softened_divergence, 1), (softened_cross_entropy, 16)):
        student = random_logits(0).double().requires_grad_()
        (factor * function(student, teacher, 4.0)).sum().backward()
        gradients.append(student.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("weight", [0.1, 1.0, 0.0])
def test_cross_entropy_has_its_weight_and_the_divergence_its_own(weight):
    student = Counting(training_student())
    batch, _, _, _ = random_batch(8)
    given = {"kd": KdTerm.Parameters(temperature=4.0, weight=0.9)}
    loss = loss_of(student, given, batch, cross_entropy=weight)
    (logits,) = student.passes
    expected = weight * cross_entropy(logits, batch.labels) + 0.9 * by_loop(logits, batch.teacher_logits, 4.0).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_hinton_with_a_constant_weight_trains_alike():
    batch, _, _, _ = random_batch(9)
    steps = []
    for losses in (
        {"kd": KdTerm.Parameters(temperature=4.0, weight=0.9)},
        {"hinton": HintonTerm.Parameters(temperature=4.0, start=0.9 * 16, end=0.9 * 16)},
    ):
        student = training_student()
        loss_of(student, losses, batch, cross_entropy=0.1).backward()
        steps.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-6)
    assert nn.functional.cosine_similarity(*steps, dim=0) > 0.999999


def standardised_by_loop(logits):
    """Of each row in float64: less the mean, over the deviation with C - 1 in its denominator."""
    rows = []
    for row in np.asarray(logits, np.float64):
        mean = sum(row) / len(row)
        rows.append((row - mean) / math.sqrt(sum((value - mean) ** 2 for value in row) / (len(row) - 1)))
    return np.array(rows)


@pytest.mark.parametrize(("size", "shift"), [(1.0, 0.0), (0.01, 5.0), (300.0, -40.0)])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_standardised_logits_have_mean_0_and_deviation_1(size, shift, classes):
    logits = shift + size * random_logits(3, 12, classes).double()
    np.testing.assert_allclose(standardised(logits), standardised_by_loop(logits), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(standardised(logits.float()), standardised_by_loop(logits), rtol=1e-2, atol=1e-2)


def test_equal_logits_are_standardised_to_0_with_a_finite_gradient():
    logits = torch.full((3, 5), 2.5, requires_grad=True)
    result = standardised(logits)
    assert (result == 0).all()
    softened_divergence(result, standardised(random_logits(0, 3, 5)), 2.0).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_the_term_standardises_both_networks_logits():
    student = Counting(training_student())
    batch, _, _, _ = random_batch(8)
    given = {"kd": KdTerm.Parameters(temperature=2.0, weight=9.0, standardised=True)}
    loss = loss_of(student, given, batch, cross_entropy=0.1)
    (logits,) = student.passes
    divergence = by_loop(standardised_by_loop(logits), standardised_by_loop(batch.teacher_logits), 2.0).mean()
    assert divergence > 0.01
    assert loss.item() == pytest.approx(0.1 * cross_entropy(logits, batch.labels) + 9 * divergence, rel=1e-5)
    plain = {"kd": KdTerm.Parameters(temperature=2.0, weight=9.0)}
    assert loss_of(student, plain, batch, cross_entropy=0.1).item() != pytest.approx(loss.item(), rel=1e-3)


def test_standardised_a_student_loses_nothing_by_shift_and_scale():
    teacher = random_logits(1).double()
    moved = 0.3 * teacher + torch.arange(len(teacher))[:, None]
    np.testing.assert_allclose(softened_divergence(standardised(moved), standardised(teacher), 2.0), 0, atol=1e-9)
    assert softened_divergence(moved, teacher, 2.0).min() > 1e-3
