"""The boundary loss against float64 NumPy, and the loss of the method against the same from the student's logits."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.losses.bss import boundary_weight, mean_over_selected, running_statistics_kept, select_base_samples
from pipeline.networks.classifier import Architecture, build
from pipeline.training.batches import BoundaryBatch, BoundarySamples
from tests.support.helpers import (
    Counting,
    bss_parameters,
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


# Methods


HINTON = {"hinton": hinton_parameters()}


def both(**changes):
    """As the paper has it: beside the softened teacher on the images."""
    return {"hinton": hinton_parameters(), "bss": bss_parameters(**changes)}


@pytest.mark.parametrize(("epoch", "alpha", "beta"), [(0, 4, 2), (3, 2.875, 1)])
@pytest.mark.parametrize("fraction", [0.25, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_bss_adds_the_softened_teacher_on_boundary_samples(seed, fraction, epoch, alpha, beta):
    student = Counting(training_student())
    batch, asked, boundary_logits, found = random_batch(seed)
    loss = loss_of(student, both(fraction=fraction), batch, epoch, 8)
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
        cross_entropy(clean, batch.labels)
        + alpha * softened(clean, batch.teacher_logits, 3.0).mean()
        + beta * np.mean(terms)
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_bss_alone_has_a_temperature_of_its_own():
    batch, asked, boundary_logits, found = random_batch(2)
    student = Counting(training_student())
    loss = loss_of(student, {"bss": bss_parameters(temperature=1.5, fraction=1.0)}, batch)
    clean, on_boundary = student.passes
    (rows,) = asked
    scores = selected_by_loop(clean, batch.teacher_logits, batch.labels, batch.usable)
    terms = [
        softened(on_boundary[place][None], boundary_logits[row][None], 1.5)[0]
        for place, row in enumerate(rows)
        if row in scores and found[row]
    ]
    assert loss.item() == pytest.approx(cross_entropy(clean, batch.labels) + 2 * np.mean(terms), rel=1e-5)


@pytest.mark.parametrize(("epoch", "epochs"), [(6, 8), (9, 10)])
def test_bss_makes_no_second_pass_once_its_weight_is_zero(epoch, epochs):
    student = Counting(training_student())
    batch, asked, _, _ = random_batch(0)
    loss = loss_of(student, both(), batch, epoch, epochs)
    assert len(student.passes) == 1
    assert asked == []
    assert loss == loss_of(training_student(), HINTON, batch, epoch, epochs)


def test_bss_without_any_boundary_sample_is_hinton():
    batch, asked, _, _ = random_batch(0)
    none_usable = dataclasses.replace(batch, usable=torch.zeros(24, dtype=torch.bool))
    loss = loss_of(training_student(), both(), none_usable)
    assert len(asked) == 1  # a fixed count of fillers, so that nothing waits for the device
    assert loss == loss_of(training_student(), HINTON, batch)


def test_bss_takes_at_least_one_row_and_a_filler_beside_it():
    batch, asked, boundary_logits, _ = random_batch(2)
    student = Counting(training_student())
    loss = loss_of(student, {"bss": bss_parameters(temperature=1.5, fraction=0.01)}, batch)
    clean, on_boundary = student.passes
    first, filler = asked[0]
    assert first != filler
    scores = selected_by_loop(clean, batch.teacher_logits, batch.labels, batch.usable)
    assert first == max(scores, key=scores.get)
    term = softened(on_boundary[0][None], boundary_logits[first][None], 1.5)[0]
    assert loss.item() == pytest.approx(cross_entropy(clean, batch.labels) + 2 * term, rel=1e-5)


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_few_rows_train_a_student_whose_maps_have_one_pixel(rows):
    student = build(Architecture("resnet8w2", 4, (1, 4, 4), (0.5,), (0.25,))).train()  # 4x4, 2x2, 1x1
    batch = BoundaryBatch(
        images=random_images(0, rows, (1, 4, 4)),
        labels=torch.zeros(rows, dtype=torch.int64),
        teacher_logits=torch.tensor([[2.0, 0, 0, 0]]).repeat(rows, 1),
        usable=torch.ones(rows, dtype=torch.bool),
        boundary=SameSamples(random_images(1, rows, (1, 4, 4))),
    )
    loss = loss_of(student, both(), batch)
    loss.backward()
    assert torch.isfinite(loss)


class SameSamples:
    """Samples by row, with equal logits of two classes."""

    def __init__(self, samples):
        self.samples = samples

    def samples_of(self, rows):
        logits = torch.tensor([[1.0, 1, 0, 0]]).repeat(len(rows), 1)
        usable = torch.ones(len(rows), dtype=torch.bool)
        return BoundarySamples(samples=self.samples[rows], teacher_logits=logits, usable=usable)


def test_the_gradient_reaches_every_weight_of_the_student():
    student = training_student()
    loss_of(student, both(), random_batch(1)[0]).backward()
    for name, parameter in student.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    assert student.network.conv1.weight.grad.abs().sum() > 0
    assert student.network.linear.weight.grad.abs().sum() > 0


def test_the_boundary_samples_have_their_own_share_of_the_gradient():
    def gradient(losses):
        student = training_student()
        loss_of(student, losses, random_batch(1)[0]).backward()
        return student.network.conv1.weight.grad

    assert not torch.allclose(gradient(both()), gradient(HINTON), rtol=1e-3)


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
    loss_of(once, HINTON, batch)
    loss_of(twice, both(moves_statistics=moves), batch)
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
