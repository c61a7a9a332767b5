"""A student beside its teacher on a split."""

import numpy as np
import pytest

from pipeline.evaluate.compare import common_pairs, compare, figures_of, teacher_side
from tests.support.helpers import CPU, random_prepared, tiny_resnet


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
