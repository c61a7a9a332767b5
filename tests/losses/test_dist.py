"""Relations with the teacher's outputs, against loops from the paper's definitions, in float64."""

import math

import numpy as np
import pytest
import torch

from pipeline.losses.dist import DistTerm, relation_losses
from tests.support.helpers import (
    Counting,
    cross_entropy,
    log_softmax,
    loss_of,
    random_batch,
    random_logits,
    training_student,
)


def pearson(one, other):
    """Of two sequences of numbers (equation 4 of the paper)."""
    mean, mean_of_other = sum(one) / len(one), sum(other) / len(other)
    covariance = sum((a - mean) * (b - mean_of_other) for a, b in zip(one, other, strict=True))
    variances = sum((a - mean) ** 2 for a in one) * sum((b - mean_of_other) ** 2 for b in other)
    return covariance / math.sqrt(variances)


def by_loop(student, teacher, temperature):
    """T^2 times the inter-class and the intra-class loss of a batch."""
    p, q = (np.exp(log_softmax(np.asarray(logits, np.float64) / temperature)) for logits in (student, teacher))
    rows, classes = p.shape
    inter = 1 - sum(pearson(p[row], q[row]) for row in range(rows)) / rows
    intra = 1 - sum(pearson(p[:, c], q[:, c]) for c in range(classes)) / classes
    return temperature**2 * inter, temperature**2 * intra


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize(("rows", "classes"), [(16, 3), (2, 10), (64, 100)])
def test_both_losses_are_those_of_the_paper(temperature, rows, classes):
    student, teacher = random_logits(classes, rows, classes).double(), random_logits(1000, rows, classes).double()
    expected = by_loop(student, teacher, temperature)
    assert min(expected) > 0.1
    # The authors' 1e-8 in the denominator counts where a class has little probability in all samples of a batch.
    for loss, wanted in zip(relation_losses(student, teacher, temperature), expected, strict=True):
        assert loss.item() == pytest.approx(wanted, rel=1e-3)
    for loss, wanted in zip(relation_losses(student.float(), teacher.float(), temperature), expected, strict=True):
        assert loss.item() == pytest.approx(wanted, rel=1e-3)


def test_outputs_that_are_linear_in_the_teachers_lose_nothing_and_opposite_ones_twice_as_much():
    teacher = torch.softmax(random_logits(1, 8, 5).double(), 1)
    for share, expected in ((0.5, 0.0), (-0.2, 2.0)):
        student = share * teacher + (1 - share) / 5
        for loss in relation_losses(student.log(), teacher.log(), 1.0):
            assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_each_loss_sees_its_own_relation():
    # The samples exchanged in both, and the classes: no relation is another one, but one alone is.
    student, teacher = random_logits(2, 8, 5).double(), random_logits(3, 8, 5).double()
    inter, intra = relation_losses(student, teacher, 2.0)
    rows, classes = torch.randperm(8, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0, 1, 4, 3])
    for both in (
        relation_losses(student[rows], teacher[rows], 2.0),
        relation_losses(student[:, classes], teacher[:, classes], 2.0),
    ):
        torch.testing.assert_close(both, (inter, intra))
    assert not torch.allclose(relation_losses(student[rows], teacher, 2.0)[1], intra, rtol=1e-2)


DEGENERATE = {
    "one sample": (torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[3.0, 1.0, 0.0]])),
    "equal samples": (torch.tensor([[1.0, 2.0, 4.0]] * 3), torch.tensor([[3.0, 1.0, 0.0]] * 3)),
    "a student without a preference": (torch.zeros(3, 4), random_logits(0, 3, 4)),
    "a teacher without a preference": (random_logits(0, 3, 4), torch.zeros(3, 4)),
    "extreme": (torch.tensor([[1e4, 0.0, -1e4], [0.0, 1e4, 0.0]]), torch.tensor([[-1e4, 0.0, 1e4], [1e4, 0.0, 0.0]])),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_batches_have_a_finite_loss_and_gradient(case):
    student, teacher = DEGENERATE[case]
    student = student.clone().requires_grad_()
    inter, intra = relation_losses(student, teacher, 1.0)
    (inter + intra).backward()
    assert torch.isfinite(student.grad).all()
    assert 0 <= inter <= 2
    assert 0 <= intra <= 2
    if case in ("one sample", "equal samples", "a teacher without a preference"):
        assert intra.item() == pytest.approx(1.0)
    if case == "a teacher without a preference":
        assert inter.item() == pytest.approx(1.0)
        assert (student.grad == 0).all()


def test_the_gradient_is_that_of_the_loss():
    student, teacher = random_logits(5, 6, 4).double().requires_grad_(), random_logits(6, 6, 4).double()
    assert torch.autograd.gradcheck(lambda x: relation_losses(x, teacher, 3.0), student)


@pytest.mark.parametrize(("inter", "intra"), [(2.0, 2.0), (1.0, 0.0), (0.0, 3.0)])
def test_the_term_has_a_weight_for_each(inter, intra):
    student = Counting(training_student())
    batch, asked, _, _ = random_batch(8)
    given = DistTerm.Parameters(temperature=4.0, inter=inter, intra=intra)
    loss = loss_of(student, {"dist": given}, batch)
    (logits,) = student.passes
    first, second = by_loop(logits, batch.teacher_logits, 4.0)
    assert min(first, second) > 0.1
    expected = cross_entropy(logits, batch.labels) + inter * first + intra * second
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert asked == []
