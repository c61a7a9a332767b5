"""Decoupled distillation against loops from the paper's definitions, in float64."""

import math

import numpy as np
import pytest
import torch

from pipeline.losses.dkd import DkdTerm, decoupled_divergence
from pipeline.training.batches import TeacherBatch
from tests.support.helpers import (
    Counting,
    cross_entropy,
    log_softmax,
    loss_of,
    random_batch,
    random_images,
    random_logits,
    random_normal,
    training_student,
)


def probabilities(logits, temperature):
    powers = [math.exp(float(value) / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


def parts_by_loop(student, teacher, label, temperature):
    """T^2 times TCKD and NCKD of one sample (equations 4 to 7 of the paper)."""
    p, q = probabilities(student, temperature), probabilities(teacher, temperature)
    others = [c for c in range(len(p)) if c != label]
    rest_p, rest_q = sum(p[c] for c in others), sum(q[c] for c in others)
    target = q[label] * math.log(q[label] / p[label]) + rest_q * math.log(rest_q / rest_p)
    non_target = sum(q[c] / rest_q * math.log((q[c] / rest_q) / (p[c] / rest_p)) for c in others)
    return temperature**2 * target, temperature**2 * non_target


def all_by_loop(student, teacher, labels, temperature):
    rows = zip(np.asarray(student), np.asarray(teacher), np.asarray(labels), strict=True)
    return np.array([parts_by_loop(s, t, int(label), temperature) for s, t, label in rows]).T


def drawn(seed, rows, classes, dtype=torch.float32):
    student, teacher = (random_logits(seed + part, rows, classes).to(dtype) for part in (0, 1000))
    labels = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed))
    labels[::2] = teacher.argmax(1)[::2]  # as of a good teacher, and of a bad one
    return student, teacher, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize(("rows", "classes"), [(16, 2), (9, 3), (16, 10), (4, 100)])
def test_both_parts_are_those_of_the_paper(temperature, rows, classes):
    student, teacher, labels = drawn(classes, rows, classes)
    result = decoupled_divergence(student, teacher, labels, temperature)
    expected = all_by_loop(student, teacher, labels, temperature)
    # Differences of logarithms of order 10 in float32, times T^2.
    for part, wanted in zip(result, expected, strict=True):
        np.testing.assert_allclose(part, wanted, rtol=1e-4, atol=2e-6 * max(1, temperature**2))
    assert max(expected[0]) > 0.1


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 5, 100])
def test_the_parts_make_up_the_divergence_of_softened_outputs(temperature, classes):
    # KL = TCKD + (1 - q_label) NCKD (equation 6 of the paper), here times T^2.
    student, teacher, labels = drawn(3, 12, classes, torch.float64)
    target, non_target = decoupled_divergence(student, teacher, labels, temperature)
    log_p, log_q = log_softmax(student / temperature), log_softmax(teacher / temperature)
    divergence = (np.exp(log_q) * (log_q - log_p)).sum(1)
    other = 1 - np.exp(log_q)[np.arange(12), labels]
    np.testing.assert_allclose(target + torch.from_numpy(other) * non_target, temperature**2 * divergence, rtol=1e-9)


def test_equal_outputs_lose_nothing():
    logits, _, labels = drawn(4, 12, 6)
    for part in decoupled_divergence(logits, logits, labels, 4.0):
        assert (part == 0).all()
    for part in decoupled_divergence(logits + 2, logits, labels, 4.0):  # nor do outputs that are all higher
        np.testing.assert_allclose(part, 0, atol=1e-5)


def test_two_classes_have_no_others_to_tell_apart():
    student, teacher, labels = drawn(5, 8, 2)
    student.requires_grad_()
    target, non_target = decoupled_divergence(student, teacher, labels, 2.0)
    assert (non_target == 0).all()
    assert (target > 0).all()
    (target.mean() + 8 * non_target.mean()).backward()
    alone = student.detach().clone().requires_grad_()
    decoupled_divergence(alone, teacher, labels, 2.0)[0].mean().backward()
    assert torch.equal(student.grad, alone.grad)


def test_the_label_says_nothing_of_the_others_and_they_say_nothing_of_it():
    student, teacher, labels = drawn(6, 8, 5)
    moved = student.scatter_add(1, labels[:, None], torch.full((8, 1), 1.5))
    np.testing.assert_allclose(
        decoupled_divergence(moved, teacher, labels, 4.0)[1],
        decoupled_divergence(student, teacher, labels, 4.0)[1],
        rtol=1e-5,
    )
    # Others exchanged among themselves leave their sum as it is.
    label = torch.zeros(8, dtype=torch.int64)
    mixed = student[:, [0, 3, 4, 2, 1]]
    target, non_target = decoupled_divergence(mixed, teacher, label, 4.0)
    np.testing.assert_allclose(target, decoupled_divergence(student, teacher, label, 4.0)[0], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(non_target, decoupled_divergence(student, teacher, label, 4.0)[1], rtol=1e-2)


EXTREME = [
    ([1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]),
    ([-1e4, 0.0, 1e4], [1e4, 0.0, -1e4]),
    ([0.0, 0.0, 0.0], [1e4, 0.0, 0.0]),
    ([1e4, 0.0, 0.0], [0.0, 0.0, 0.0]),
    ([-300.0, 0.0, 300.0], [-300.0, 300.0, 0.0]),
]


@pytest.mark.parametrize(("student", "teacher"), EXTREME)
@pytest.mark.parametrize("label", range(3))
@pytest.mark.parametrize("classes", [2, 3])
def test_extreme_logits_have_a_finite_loss_and_gradient(student, teacher, label, classes):
    if label >= classes:
        label = 0
    ours = torch.tensor([student[:classes]], requires_grad=True)
    parts = decoupled_divergence(ours, torch.tensor([teacher[:classes]]), torch.tensor([label]), 1.0)
    (parts[0] + parts[1]).sum().backward()
    assert all(torch.isfinite(part).all() for part in parts)
    assert torch.isfinite(ours.grad).all()
    assert all((part >= -1e-5).all() for part in parts)


def test_extreme_logits_have_the_loss_that_they_have_by_hand():
    # The teacher is sure of the label, the student of a class that is 2e4 logits above it.
    student, teacher = torch.tensor([[-1e4, 0.0, 1e4]]), torch.tensor([[1e4, 0.0, -1e4]])
    target, non_target = decoupled_divergence(student, teacher, torch.tensor([0]), 1.0)
    assert target.item() == pytest.approx(2e4)
    assert non_target.item() == pytest.approx(1e4)  # among the others it is sure of the one that is 1e4 below


def test_the_gradient_is_that_of_the_loss():
    student, teacher, labels = drawn(7, 5, 4, torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: decoupled_divergence(x, teacher, labels, 3.0), student)
    (_, non_target) = decoupled_divergence(student, teacher, labels, 3.0)
    non_target.sum().backward()
    assert (student.grad[torch.arange(5), labels] == 0).all()


SCHEDULES = [(0, 10, 0.0, 1.0), (0, 10, 0.4, 0.0), (1, 10, 0.4, 0.25), (4, 10, 0.4, 1.0), (9, 10, 0.4, 1.0)]


@pytest.mark.parametrize(("epoch", "epochs", "warm_up", "warmth"), SCHEDULES)
def test_the_term_grows_to_its_weights(epoch, epochs, warm_up, warmth):
    student = Counting(training_student())
    batch, asked, _, _ = random_batch(8)
    given = DkdTerm.Parameters(temperature=4.0, target=1.5, non_target=6.0, warm_up=warm_up)
    loss = loss_of(student, {"dkd": given}, batch, epoch, epochs)
    (logits,) = student.passes
    target, non_target = all_by_loop(logits, batch.teacher_logits, batch.labels, 4.0)
    part = 1.5 * target.mean() + 6 * non_target.mean()
    assert part > 0.5
    assert loss.item() == pytest.approx(cross_entropy(logits, batch.labels) + warmth * part, rel=1e-5)
    assert asked == []


def test_the_term_standardises_both_networks_logits():
    student = Counting(training_student())
    batch, _, _, _ = random_batch(8)
    given = DkdTerm.Parameters(temperature=2.0, target=9.0, non_target=81.0, warm_up=0.0, standardised=True)
    loss = loss_of(student, {"dkd": given}, batch)
    (logits,) = student.passes
    ours, theirs = (
        (rows - rows.mean(1, keepdims=True)) / rows.std(1, ddof=1, keepdims=True)
        for rows in (logits, batch.teacher_logits.double().numpy())
    )
    target, non_target = all_by_loop(ours, theirs, batch.labels, 2.0)
    part = 9 * target.mean() + 81 * non_target.mean()
    assert part > 0.5
    assert loss.item() == pytest.approx(cross_entropy(logits, batch.labels) + part, rel=1e-5)


@pytest.mark.parametrize("weights", [{"target": 1.0, "non_target": 0.0}, {"target": 0.0, "non_target": 1.0}])
def test_each_part_has_its_own_weight(weights):
    student = Counting(training_student())
    batch, _, _, _ = random_batch(9)
    loss = loss_of(student, {"dkd": DkdTerm.Parameters(temperature=2.0, warm_up=0.0, **weights)}, batch)
    (logits,) = student.passes
    parts = all_by_loop(logits, batch.teacher_logits, batch.labels, 2.0).mean(1)
    expected = parts[0] if weights["target"] else parts[1]
    assert loss.item() == pytest.approx(cross_entropy(logits, batch.labels) + expected, rel=1e-5)


def test_the_gradient_reaches_every_weight_of_the_student():
    def gradients(losses):
        student = training_student()
        batch = TeacherBatch(
            images=random_images(10, 12), labels=torch.arange(12) % 4, teacher_logits=random_normal(11, 12, 4, size=3.0)
        )
        loss_of(student, losses, batch).backward()
        return [parameter.grad for parameter in student.parameters()]

    with_it = gradients({"dkd": DkdTerm.Parameters(temperature=4.0, target=1.0, non_target=8.0, warm_up=0.0)})
    assert all(torch.isfinite(gradient).all() for gradient in with_it)
    # Of the first and of the last layer.
    for place in (0, -1):
        assert not torch.allclose(with_it[place], gradients({})[place], rtol=1e-2)
