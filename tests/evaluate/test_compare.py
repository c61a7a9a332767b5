"""A student beside its teacher on a split."""

import numpy as np
import pytest
import torch

from pipeline.core.status import Status
from pipeline.evaluate.compare import common_pairs, compare, figures_of, teacher_side
from pipeline.evaluate.planes import POINTS, TRIPLETS, classes_on_planes, points_of_a_plane
from tests.support.files import mislabelled
from tests.support.helpers import CPU, random_linear_classifier, random_prepared, tiny_resnet
from tests.support.searches import newton


@pytest.fixture(scope="module")
def split():
    return random_prepared(0, 41, model=tiny_resnet(0))


def test_a_network_has_the_boundary_of_itself(split):
    side = teacher_side(tiny_resnet(0), split, CPU, 16)
    comparison = compare(tiny_resnet(0), side, split, CPU, 16)
    figures = figures_of(comparison, common_pairs([comparison]))
    assert figures["accuracy"] == figures["agreement"] == 1
    assert figures["teacher_divergence"] == pytest.approx(0, abs=1e-6)
    assert figures["pairs"] + figures["pairs_left_out"] == 41
    assert figures["pairs"] >= 35
    assert figures["mag_sim"] == pytest.approx(1, abs=1e-5)
    assert figures["ang_sim"] == pytest.approx(1, abs=1e-5)
    assert figures["plane_agreement"] == 1
    # Half of the boundaries are farther than the median, and all are farther than half of it, or nearly so.
    assert figures["distance"] == pytest.approx(2 * side.radius, rel=1e-5)
    assert 0.5 < figures["robust_accuracy"] <= 1


def test_distance_and_robustness_are_those_of_the_students_own_search(split):
    split = mislabelled(split)
    side, student = teacher_side(tiny_resnet(0), split, CPU, 16), tiny_resnet(0, std=0.4)
    comparison = compare(student, side, split, CPU, 16)
    images = torch.from_numpy(split.images).float() / 255
    logits = student(images)
    right = (logits.argmax(1).numpy() == split.labels).nonzero()[0]
    found = {}
    for row in right:
        second = int(logits[row].argsort(descending=True)[1])
        base, target = torch.tensor([split.labels[row]]), torch.tensor([second])
        result = newton(student, images[row : row + 1], base, target, max_gradients=20, levels=None)
        if result.status.item() == Status.CONVERGED:
            found[row] = result.distance.item()
    assert 3 < len(found) < 41
    assert comparison.distance == pytest.approx(sorted(found.values())[(len(found) - 1) // 2], rel=1e-3)
    kept = [row for row in right if found.get(row, np.inf) > side.radius]
    assert 0 < len(kept) < len(right)
    assert comparison.robust_accuracy == pytest.approx(len(kept) / 41)


def test_the_calibration_error_is_that_of_its_definition(split):
    comparison = compare(tiny_resnet(1), teacher_side(tiny_resnet(0), split, CPU, 16), split, CPU, 16)
    probabilities = tiny_resnet(1)(torch.from_numpy(split.images).float() / 255).softmax(1)
    confidence, top = (each.numpy() for each in probabilities.max(1))
    bins, error = np.minimum((confidence * 15).astype(int), 14), 0.0
    for number in range(15):
        rows = bins == number
        if rows.any():
            error += rows.mean() * abs(confidence[rows].mean() - (top[rows] == split.labels[rows]).mean())
    assert comparison.calibration_error == pytest.approx(error, abs=1e-5)
    assert error > 0.1


def test_planes_go_through_three_images(split):
    model = random_linear_classifier(0, dtype=torch.float32)
    images = random_prepared(0, 3).images
    found = classes_on_planes(model, images)
    assert len(found) == TRIPLETS * POINTS
    # Any three of three images span one plane: every point is a + b (x2 - x1) + c (x3 - x1), with weights of sum 1.
    x = torch.from_numpy(images).float() / 255
    corners = set(model(x).argmax(1).tolist())
    assert corners <= set(found.tolist())
    assert np.array_equal(found, classes_on_planes(model, images))
    generator = np.random.default_rng(0)
    order = generator.choice(3, 3, replace=False)
    places = torch.from_numpy(generator.uniform(-0.1, 1.1, (POINTS, 2)).astype(np.float32))
    weights = torch.cat([1 - places.sum(1, keepdim=True), places], 1)
    points = torch.einsum("pk,kchw->pchw", weights, x[order])
    assert np.array_equal(found[:POINTS], model(points).argmax(1).numpy())


@pytest.mark.parametrize(("size", "points"), [(8, 50), (32, 50), (64, 50), (96, 22), (224, 5), (1024, 5)])
def test_planes_of_large_images_have_fewer_points(size, points):
    assert points_of_a_plane((3, size, size)) == points
    if 64 < size < 224:
        model = random_linear_classifier(0, 2, (3, size, size), torch.float32)
        assert len(classes_on_planes(model, np.zeros((3, 3, size, size), np.uint8))) == 200 * points


def test_only_images_that_both_classify_correctly_give_a_pair(split):
    side = teacher_side(tiny_resnet(0), split, CPU, 16)
    comparison = compare(tiny_resnet(1), side, split, CPU, 16)
    right = np.isfinite(comparison.magnitude)
    assert right.sum() <= round(comparison.accuracy * 41)
    assert 0 < right.sum() < 41
    assert np.array_equal(right, np.isfinite(comparison.angle))


@pytest.mark.parametrize(("images", "step"), [(5, 8), (10, 4), (20, 2), (41, 1), (100, 1)])
def test_fewer_images_are_evenly_spread_and_give_the_same_pairs(split, images, step):
    whole = compare(tiny_resnet(1), teacher_side(tiny_resnet(0), split, CPU, 64), split, CPU, 64)
    side = teacher_side(tiny_resnet(0), split, CPU, 64, images)
    part = compare(tiny_resnet(1), side, split, CPU, 64)
    assert (part.accuracy, part.agreement, part.divergence) == (whole.accuracy, whole.agreement, whole.divergence)
    np.testing.assert_allclose(part.magnitude, whole.magnitude[::step], atol=1e-4)
    np.testing.assert_allclose(part.angle, whole.angle[::step], atol=1e-3)
