"""Relations between embeddings against loops from the paper's definitions, in float64."""

import itertools

import numpy as np
import pytest
import torch

from pipeline.losses.rkd import RkdTerm, angle_loss, distance_loss
from pipeline.training.batches import Batch, TeacherBatch
from pipeline.training.objective import Moment, Objective
from pipeline.training.term import embedding
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


def huber(x, y):
    """Equation 7 of the paper."""
    return 0.5 * (x - y) ** 2 if abs(x - y) <= 1 else abs(x - y) - 0.5


def length(vector):
    return sum(float(value) ** 2 for value in vector) ** 0.5


def distances_by_loop(points):
    """Of each ordered pair, over the mean of those that are not 0 (as in the code of the authors)."""
    pairs = list(itertools.product(range(len(points)), repeat=2))
    distances = [length(points[i] - points[j]) for i, j in pairs]
    apart = [distance for distance in distances if distance > 0]
    return [distance / (sum(apart) / len(apart)) if apart else 0.0 for distance in distances]


def cosines_by_loop(points):
    """At j, between the directions to i and to k; 0 where there is no direction."""
    cosines = []
    for j, i, k in itertools.product(range(len(points)), repeat=3):
        first, second = points[i] - points[j], points[k] - points[j]
        product = length(first) * length(second)
        cosines.append(sum(float(a) * float(b) for a, b in zip(first, second, strict=True)) / product if product else 0)
    return cosines


def loss_by_loop(relation, student, teacher):
    """Huber loss of a relation, mean over all pairs or triplets of indices, a sample with itself included."""
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    losses = [huber(x, y) for x, y in zip(relation(student), relation(teacher), strict=True)]
    return sum(losses) / len(losses)


SHAPES = [((6, 3), (6, 8)), ((2, 1), (2, 5)), ((9, 16), (9, 2))]


@pytest.mark.parametrize(("student", "teacher"), SHAPES)
@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_distances_are_compared_as_in_the_paper(student, teacher, size):
    first, second = random_normal(0, *student, size=size), random_normal(1, *teacher)
    expected = loss_by_loop(distances_by_loop, first, second)
    assert expected > 1e-3 or len(first) == 2  # of two samples the only distance is the mean
    # Relative distances of float32, near 1, are squared.
    assert distance_loss(first, second).item() == pytest.approx(expected, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize(("student", "teacher"), SHAPES)
@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_angles_are_compared_as_in_the_paper(student, teacher, size):
    first, second = random_normal(2, *student, size=size), random_normal(3, *teacher)
    expected = loss_by_loop(cosines_by_loop, first, second)
    assert expected > 1e-3 or len(first) == 2
    assert angle_loss(first, second).item() == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_large_differences_count_linearly():
    # Cosines of points on a line are 1 or -1: where the middle one is another, they differ by 2.
    student, teacher = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [0.0], [2.0]])
    assert huber(1, -1) == 1.5
    assert angle_loss(student, teacher).item() == pytest.approx(4 * 1.5 / 27)
    # Distances over their mean: one pair of four is far.
    student = torch.tensor([[0.0], [0.01], [0.02], [10.0]])
    teacher = torch.tensor([[10.0], [0.01], [0.02], [0.0]])
    assert any(abs(a - b) > 1 for a, b in zip(*map(distances_by_loop, (student, teacher)), strict=True))
    assert distance_loss(student, teacher).item() == pytest.approx(
        loss_by_loop(distances_by_loop, student, teacher), rel=1e-4
    )


@pytest.mark.parametrize("loss", [distance_loss, angle_loss])
def test_neither_the_same_embeddings_nor_moved_turned_or_larger_ones_lose_anything(loss):
    teacher = random_normal(4, 7, 5, dtype=torch.float64)
    assert loss(teacher, teacher) == 0
    turn = torch.linalg.qr(random_normal(5, 5, 5, dtype=torch.float64))[0]
    assert loss(3 * teacher @ turn + 2, teacher).item() < 1e-25
    assert loss(teacher * torch.tensor([1.0, 1, 1, 1, 2]), teacher).item() > 1e-4


DUPLICATES = {
    "two of them": lambda points: points.index_copy(0, torch.tensor([3]), points[1:2]),
    "all of them": lambda points: points[:1].expand_as(points).clone(),
    "zeros": torch.zeros_like,
    "one row": lambda points: points[:1].clone(),
}


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("case", DUPLICATES)
def test_duplicates_have_a_finite_loss_and_gradient(case, which):
    student, teacher = random_normal(6, 6, 3), random_normal(7, 6, 4)
    if which != "teacher" or case == "one row":
        student = DUPLICATES[case](student)
    if which != "student" or case == "one row":
        teacher = DUPLICATES[case](teacher)
    for loss, relation in ((distance_loss, distances_by_loop), (angle_loss, cosines_by_loop)):
        points = student.clone().requires_grad_()
        result = loss(points, teacher)
        result.backward()
        assert result.item() == pytest.approx(loss_by_loop(relation, student, teacher), rel=1e-4, abs=1e-9)
        assert torch.isfinite(points.grad).all()
    if case == "two of them":
        assert points.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", [distance_loss, angle_loss])
def test_the_gradient_is_that_of_the_loss(loss):
    student = random_normal(8, 5, 3, dtype=torch.float64).requires_grad_()
    teacher = random_normal(9, 5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student)


def test_maps_are_averaged_over_positions():
    maps = random_normal(10, 3, 4, 2, 5)
    expected = [[maps[n, c].double().numpy().sum() / 10 for c in range(4)] for n in range(3)]
    np.testing.assert_allclose(embedding(maps), expected, rtol=1e-5, atol=1e-7)
    vectors = random_normal(11, 3, 4)
    assert torch.equal(embedding(vectors), vectors)


WEIGHTS = [(25.0, 50.0), (25.0, 0.0), (0.0, 50.0)]


@pytest.mark.parametrize("layers", [["layer3"], ["layer1", "linear"]])
@pytest.mark.parametrize(("distance", "angle"), WEIGHTS)
def test_the_term_is_the_sum_over_layers_with_its_weights(layers, distance, angle):
    network, teacher = training_student(), wide_teacher()
    student = Counting(network)
    batch = Batch(images=random_images(12, 10), labels=torch.arange(10) % 4)
    given = RkdTerm.Parameters(student_layers=layers, teacher_layers=layers, distance=distance, angle=angle)
    loss = loss_of(student, {"rkd": given}, batch, 3, 8, teacher)
    ours, theirs = features_of(network, batch.images), features_of(teacher, batch.images)
    part = 0.0
    for name in layers:
        pair = [values[name].mean((2, 3)) if values[name].ndim == 4 else values[name] for values in (ours, theirs)]
        part += distance * loss_by_loop(distances_by_loop, *pair) + angle * loss_by_loop(cosines_by_loop, *pair)
    assert part > 0.05
    (logits,) = student.passes
    assert loss.item() == pytest.approx(cross_entropy(logits, batch.labels) + part, rel=1e-4)


def test_the_gradient_reaches_the_student_and_not_the_teacher():
    teacher = wide_teacher().requires_grad_(True)
    batch = Batch(images=random_images(13, 12), labels=torch.arange(12) % 4)
    given = RkdTerm.Parameters(student_layers=["layer3"], teacher_layers=["layer3"], distance=25.0, angle=50.0)
    plain, other = training_student(), training_student()
    loss_of(plain, {}, batch).backward()
    loss_of(other, {"rkd": given}, batch, teacher=teacher).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in other.parameters())
    assert not torch.allclose(plain.network.conv1.weight.grad, other.network.conv1.weight.grad, rtol=1e-2)
    torch.testing.assert_close(plain.network.linear.weight.grad, other.network.linear.weight.grad)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_penultimate_features_are_the_input_of_the_last_linear_layer():
    """Of the student as its hooks give them, of the teacher as the batch has them: no teacher is at hand."""
    images, labels, student = random_images(3, 6), torch.arange(6) % 4, training_student().eval()
    features = random_normal(4, 6, 9)
    batch = TeacherBatch(images=images, labels=labels, teacher_logits=random_normal(5, 6, 4), teacher_features=features)
    given = RkdTerm.Parameters(student_layers=["penultimate"], teacher_layers=["penultimate"], distance=2.0, angle=3.0)
    objective = Objective(student, {"rkd": given}, cross_entropy=0.5, stored_features=9)
    found = objective.loss(student, batch, Moment(False, 0, 1)).item()
    of_student = features_of(student, images)
    pooled = of_student["layer3"].mean((2, 3))
    expected = 0.5 * cross_entropy(of_student["linear"], labels)
    expected += 2 * loss_by_loop(distances_by_loop, pooled, features)
    expected += 3 * loss_by_loop(cosines_by_loop, pooled, features)
    assert found == pytest.approx(expected, rel=1e-4)
