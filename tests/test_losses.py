"""Losses against float64 NumPy, and the loss of each method against the same from the student's logits."""

import copy

import numpy as np
import pytest
import torch
from pipeline.losses import (
    boundary_weight,
    hinton_weight,
    mean_over_selected,
    select_base_samples,
    softened_cross_entropy,
)
from torch import nn

from pipeline.batches import Batch, BoundaryBatch
from pipeline.methods import LOSSES, bss, hinton, original, running_statistics_kept
from tests.helpers import (
    distillation_parameters,
    random_images,
    tiny_resnet,
)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def softened(student, teacher, temperature):
    target = np.exp(log_softmax(np.asarray(teacher, np.float64) / temperature))
    return -(target * log_softmax(np.asarray(student, np.float64) / temperature)).sum(1)


def random_logits(seed, rows=16, classes=5, size=3.0):
    return size * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


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


def selected_by_loop(student, teacher, labels, usable):
    """Scores of the candidates, by row."""
    scores = {}
    for row in range(len(labels)):
        student_row, teacher_row = np.asarray(student[row], np.float64), np.asarray(teacher[row], np.float64)
        label = int(labels[row])
        if not usable[row] or student_row.argmax() != label or teacher_row.argmax() != label:
            continue
        p, q = np.exp(log_softmax(student_row[None]))[0], np.exp(log_softmax(teacher_row[None]))[0]
        scores[row] = sum((p[other] - q[other]) ** 2 for other in range(len(p)) if other != label)
    return scores


@pytest.mark.parametrize("count", [1, 8, 40])
@pytest.mark.parametrize("seed", range(4))
def test_base_samples_are_the_candidates_that_differ_most(seed, count):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = random_logits(seed, 40), random_logits(seed, 40) + 0.7 * random_logits(seed + 100, 40)
    labels = torch.where(torch.rand(40, generator=generator) < 0.8, student.argmax(1), 0)
    usable = torch.rand(40, generator=generator) < 0.8
    scores = selected_by_loop(student, teacher, labels, usable)
    assert 8 < len(scores) < 40
    chosen = select_base_samples(student, teacher, labels, usable, count)
    assert chosen.rows.shape == chosen.weights.shape == (count,)
    assert len(set(chosen.rows.tolist())) == count
    assert set(chosen.weights.tolist()) <= {0.0, 1.0}
    expected = sorted(scores, key=scores.get, reverse=True)[:count]
    assert chosen.rows[chosen.weights > 0].tolist() == expected


def test_of_tied_candidates_some_are_chosen_and_no_other():
    # Rows 1 to 4 tie; row 0 differs less, row 5 is not usable.
    student = torch.tensor([[2.0, 0.0, 0.0]] + [[2.0, 1.0, 0.0]] * 5)
    teacher = torch.tensor([[2.0, 0.0, 0.0]] * 6)
    usable = torch.tensor([True] * 5 + [False])
    chosen = select_base_samples(student, teacher, torch.zeros(6, dtype=torch.int64), usable, 3)
    assert chosen.weights.tolist() == [1, 1, 1]
    assert len(set(chosen.rows.tolist())) == 3
    assert set(chosen.rows.tolist()) <= {1, 2, 3, 4}


def test_a_candidate_that_does_not_differ_still_counts_as_chosen():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    chosen = select_base_samples(logits, logits, torch.tensor([0, 0]), torch.tensor([True, True]), 2)
    assert dict(zip(chosen.rows.tolist(), chosen.weights.tolist(), strict=True)) == {0: 1.0, 1: 0.0}


@pytest.mark.parametrize("reason", ["not usable", "student wrong", "teacher wrong"])
def test_without_candidates_all_weights_are_zero(reason):
    right, wrong = torch.tensor([[3.0, 0.0, 0.0]]).repeat(6, 1), torch.tensor([[0.0, 3.0, 0.0]]).repeat(6, 1)
    chosen = select_base_samples(
        wrong if reason == "student wrong" else right,
        wrong if reason == "teacher wrong" else right,
        torch.zeros(6, dtype=torch.int64),
        torch.full((6,), reason != "not usable"),
        4,
    )
    assert len(set(chosen.rows.tolist())) == 4
    assert chosen.weights.tolist() == [0, 0, 0, 0]


def test_mean_over_selected():
    losses = torch.tensor([1.0, 2.0, 6.0, 100.0])
    assert mean_over_selected(losses, torch.tensor([1.0, 0.0, 1.0, 0.0])) == 3.5
    assert mean_over_selected(losses, torch.zeros(4)) == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_selected_leak_neither_value_nor_gradient(value):
    losses = torch.tensor([1.0, value, 3.0], requires_grad=True)
    mean = mean_over_selected(losses, torch.tensor([1.0, 0.0, 1.0]))
    mean.backward()
    assert mean == 2
    assert losses.grad.tolist() == [0.5, 0, 0.5]
    assert mean_over_selected(torch.tensor([value]), torch.zeros(1)) == 0


@pytest.mark.parametrize(("progress", "expected"), [(0, 2), (0.375, 1), (0.75, 0), (0.9, 0), (1, 0)])
def test_boundary_weight(progress, expected):
    assert boundary_weight(progress, start=2, zero_at=0.75) == pytest.approx(expected, abs=1e-12)


def test_boundary_weight_is_exactly_zero_from_its_end_on():
    # Exactly, because a method leaves out the boundary pass where the weight is 0.
    epochs = 40
    weights = [boundary_weight(epoch / epochs, 2.0, 0.75) for epoch in range(epochs)]
    assert all(weight > 0 for weight in weights[:30])
    assert weights[30:] == [0.0] * 10


@pytest.mark.parametrize(("progress", "expected"), [(0, 4), (0.25, 3.25), (0.5, 2.5), (1, 1)])
def test_hinton_weight(progress, expected):
    assert hinton_weight(progress, start=4, end=1) == pytest.approx(expected, abs=1e-12)


# Methods


class Counting(nn.Module):
    """A student that remembers the logits of its passes."""

    def __init__(self, student):
        super().__init__()
        self.student = student
        self.passes = []

    def forward(self, images):
        logits = self.student(images)
        self.passes.append(logits.detach().double().numpy())
        return logits


def training_student(seed=0):
    return tiny_resnet(seed).train().requires_grad_(True)


def cross_entropy(logits, labels):
    return -log_softmax(logits)[np.arange(len(labels)), labels].mean()


def random_batch(seed, rows=24):
    """A batch of which the student's and the teacher's classes often are the labels; and what `boundary` gave out."""
    generator = torch.Generator().manual_seed(seed)
    images = random_images(seed, rows)
    student = training_student()(images).detach()
    teacher = student + 0.8 * torch.randn(student.shape, generator=generator)
    labels = torch.where(torch.rand(rows, generator=generator) < 0.8, student.argmax(1), 0)
    usable = torch.rand(rows, generator=generator) < 0.9
    samples = random_images(seed + 1, rows)
    boundary_logits = 3 * torch.randn(student.shape, generator=generator)
    found = torch.rand(rows, generator=generator) < 0.8
    asked = []

    def boundary(chosen):
        asked.append(chosen.tolist())
        return BoundaryBatch(samples[chosen], boundary_logits[chosen], found[chosen])

    batch = Batch(images, labels, teacher, usable, boundary)
    return batch, asked, boundary_logits.numpy(), found.numpy()


def test_original_is_the_cross_entropy_with_the_labels():
    student = Counting(training_student())
    batch = Batch(random_images(0, 12), torch.arange(12) % 4)
    loss = original(student, batch, distillation_parameters(), 0.3)
    assert loss.item() == pytest.approx(cross_entropy(student.passes[0], batch.labels.numpy()), rel=1e-5)
    assert len(student.passes) == 1


@pytest.mark.parametrize(("progress", "alpha"), [(0, 4), (0.5, 2.5), (0.9, 1.3)])
def test_hinton_adds_the_softened_teacher(progress, alpha):
    student = Counting(training_student())
    batch, asked, _, _ = random_batch(3)
    loss = hinton(student, batch, distillation_parameters(temperature=2.0), progress)
    (logits,) = student.passes
    expected = cross_entropy(logits, batch.labels.numpy()) + alpha * softened(logits, batch.teacher_logits, 2.0).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert asked == []


@pytest.mark.parametrize(("progress", "alpha", "beta"), [(0, 4, 2), (0.375, 2.875, 1)])
@pytest.mark.parametrize("fraction", [0.25, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_bss_adds_the_softened_teacher_on_boundary_samples(seed, fraction, progress, alpha, beta):
    student = Counting(training_student())
    batch, asked, boundary_logits, found = random_batch(seed)
    loss = bss(student, batch, distillation_parameters(boundary_fraction=fraction), progress)
    clean, on_boundary = student.passes
    (rows,) = asked
    assert len(rows) == fraction * 24
    scores = selected_by_loop(clean, batch.teacher_logits, batch.labels, batch.usable)
    chosen = sorted(scores, key=scores.get, reverse=True)[: len(rows)]
    terms = [
        softened(on_boundary[place][None], boundary_logits[row][None], 3.0)[0]
        for place, row in enumerate(rows)
        if row in chosen and found[row]
    ]
    assert 0 < len(terms) < 24
    expected = (
        cross_entropy(clean, batch.labels.numpy())
        + alpha * softened(clean, batch.teacher_logits, 3.0).mean()
        + beta * np.mean(terms)
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("progress", [0.75, 0.9])
def test_bss_makes_no_second_pass_once_its_weight_is_zero(progress):
    student = Counting(training_student())
    batch, asked, _, _ = random_batch(0)
    loss = bss(student, batch, distillation_parameters(), progress)
    assert len(student.passes) == 1
    assert asked == []
    assert loss == hinton(training_student(), batch, distillation_parameters(), progress)


def test_bss_without_any_boundary_sample_is_hinton():
    batch, asked, _, _ = random_batch(0)
    none_usable = Batch(
        batch.images, batch.labels, batch.teacher_logits, torch.zeros(24, dtype=torch.bool), batch.boundary
    )
    loss = bss(training_student(), none_usable, distillation_parameters(), 0.0)
    assert len(asked) == 1  # a fixed count of fillers, so that nothing waits for the device
    assert loss == hinton(training_student(), batch, distillation_parameters(), 0.0)


def test_bss_takes_at_least_one_row():
    batch, asked, _, _ = random_batch(0)
    bss(training_student(), batch, distillation_parameters(boundary_fraction=0.01), 0.0)
    assert len(asked[0]) == 1


@pytest.mark.parametrize("method", LOSSES)
def test_the_gradient_reaches_every_weight_of_the_student(method):
    student = training_student()
    batch, _, _, _ = random_batch(1)
    LOSSES[method](student, batch, distillation_parameters(), 0.0).backward()
    for name, parameter in student.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    assert student.network.conv1.weight.grad.abs().sum() > 0
    assert student.network.linear.weight.grad.abs().sum() > 0


def test_the_boundary_samples_have_their_own_share_of_the_gradient():
    def gradient(method):
        student = training_student()
        method(student, random_batch(1)[0], distillation_parameters(), 0.0).backward()
        return student.network.conv1.weight.grad

    assert not torch.allclose(gradient(bss), gradient(hinton), rtol=1e-3)


def running_statistics(student):
    return {name: value for name, value in student.named_buffers() if name.endswith(("running_mean", "running_var"))}


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_by_the_boundary_pass_only_if_asked(moves, momentum):
    once, twice = training_student(), training_student()
    for module in [*once.modules(), *twice.modules()]:
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
            module.reset_running_stats()
    batch, _, _, _ = random_batch(0)
    hinton(once, batch, distillation_parameters(), 0.0)
    bss(twice, batch, distillation_parameters(boundary_moves_statistics=moves), 0.0)
    after_one, after_two = running_statistics(once), running_statistics(twice)
    assert len(after_one) == 14
    for name, value in after_one.items():
        assert torch.equal(value, after_two[name]) != moves, name


def test_kept_statistics_are_released_afterwards():
    student = training_student()
    layers = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d)]
    for number, layer in enumerate(layers):
        layer.momentum = 0.1 + 0.01 * number
    before = copy.deepcopy(running_statistics(student))

    logits = []

    def interrupted_pass():
        with running_statistics_kept(student):
            logits.append(student(random_images(0, 8)))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        interrupted_pass()
    for name, value in running_statistics(student).items():
        assert torch.equal(value, before[name]), name
    assert [layer.momentum for layer in layers] == [0.1 + 0.01 * number for number in range(len(layers))]
    # In between, the batch's own statistics normalise, as in training.
    torch.testing.assert_close(logits[0], student(random_images(0, 8)))
    assert not torch.allclose(
        running_statistics(student)["network.bn1.running_mean"], before["network.bn1.running_mean"]
    )
