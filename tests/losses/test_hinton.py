"""Softened outputs against float64 NumPy, and the loss of the method against the same from the student's logits."""

import numpy as np
import pytest
import torch

from pipeline.losses.hinton import hinton_weight, softened_cross_entropy
from pipeline.training.batches import Batch
from tests.support.helpers import (
    Counting,
    cross_entropy,
    hinton_parameters,
    log_softmax,
    loss_of,
    random_batch,
    random_images,
    random_logits,
    softened,
    training_student,
)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("classes", [2, 5, 100])
def test_softened_cross_entropy(temperature, classes):
    student, teacher = random_logits(0, classes=classes), random_logits(1, classes=classes)
    result = softened_cross_entropy(student, teacher, temperature)
    # Near zero, a loss is as exact as 1 minus a float32 probability.
    np.testing.assert_allclose(result.numpy(), softened(student, teacher, temperature), rtol=1e-5, atol=1e-6)


def test_softened_cross_entropy_of_equal_outputs_is_their_entropy():
    logits = random_logits(0)
    log_probability = log_softmax(logits / 3)
    entropy = -(np.exp(log_probability) * log_probability).sum(1)
    np.testing.assert_allclose(softened_cross_entropy(logits, logits, 3.0).numpy(), entropy, rtol=1e-5)
    # More than the entropy for anything else.
    assert (softened_cross_entropy(random_logits(1), logits, 3.0).numpy() > entropy).all()


def test_softened_cross_entropy_of_extreme_logits_is_finite():
    student, teacher = torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[-1e4, 0.0, 1e4]])
    np.testing.assert_allclose(softened_cross_entropy(student, teacher, 1.0).numpy(), [2e4], rtol=1e-6)


@pytest.mark.parametrize(("progress", "expected"), [(0, 4), (0.25, 3.25), (0.5, 2.5), (1, 1)])
def test_hinton_weight(progress, expected):
    assert hinton_weight(progress, start=4, end=1) == pytest.approx(expected, abs=1e-12)


# Methods


def test_without_losses_it_is_the_cross_entropy_with_the_labels():
    student = Counting(training_student())
    batch = Batch(images=random_images(0, 12), labels=torch.arange(12) % 4)
    loss = loss_of(student, {}, batch, 3, 10)
    assert loss.item() == pytest.approx(cross_entropy(student.passes[0], batch.labels), rel=1e-5)
    assert len(student.passes) == 1


@pytest.mark.parametrize(("epoch", "epochs", "alpha"), [(0, 7, 4), (1, 2, 2.5), (9, 10, 1.3)])
def test_hinton_adds_the_softened_teacher(epoch, epochs, alpha):
    student = Counting(training_student())
    batch, asked, _, _ = random_batch(3)
    loss = loss_of(student, {"hinton": hinton_parameters(temperature=2.0)}, batch, epoch, epochs)
    (logits,) = student.passes
    expected = cross_entropy(logits, batch.labels) + alpha * softened(logits, batch.teacher_logits, 2.0).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert asked == []


@pytest.mark.parametrize("losses", [{}, {"hinton": hinton_parameters()}], ids=["original", "hinton"])
def test_the_gradient_reaches_every_weight_of_the_student(losses):
    student = training_student()
    batch, _, _, _ = random_batch(1)
    loss_of(student, losses, batch).backward()
    for name, parameter in student.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    assert student.network.conv1.weight.grad.abs().sum() > 0
    assert student.network.linear.weight.grad.abs().sum() > 0
