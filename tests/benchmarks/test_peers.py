"""What the comparison with other attacks measures, against closed forms."""

import numpy as np
import pytest
import torch

from benchmarks.measuring import Searches
from benchmarks.peers import TOLERANCE, distance_of, on_their_rays, optimality
from pipeline.search.boundary import margin_of, probability_margin
from tests.support.helpers import linear_classifier


def area_under_curve(distances, end):
    """Of the robust accuracy from 0 to `end`, by a sum over a fine grid."""
    grid = (np.arange(200_000) + 0.5) / 200_000 * end
    return (1 - np.searchsorted(np.sort(distances), grid, side="right") / len(distances)).mean() * end


def test_optimality_is_the_ratio_of_areas_above_the_curves():
    draw = np.random.default_rng(0)
    smallest = draw.uniform(0.01, 1, 50)
    distances = smallest * draw.uniform(1, 3, 50)
    distances[7] = np.inf
    end = smallest.max()
    expected = (end - area_under_curve(distances, end)) / (end - area_under_curve(smallest, end))
    assert optimality(torch.tensor(distances), torch.tensor(smallest)) == pytest.approx(expected, abs=1e-4)


def test_optimality_of_the_best_is_1_and_of_nothing_found_0():
    smallest = torch.tensor([0.1, 0.2, 0.4])
    assert optimality(smallest, smallest) == 1
    assert optimality(torch.full((3,), torch.inf), smallest) == 0


@pytest.fixture
def searches():
    """Images (0.2, 0.5) of class 0. Class 1 begins at 0.5 of the first pixel, class 2 there at 0.9 of the second."""
    weight = torch.tensor([[-10.0, 0.0], [10.0, 0.0], [0.0, 40.0]]).view(3, 1, 1, 2)
    teacher = linear_classifier(weight, torch.tensor([5.0, -5.0, -36.0]))
    images = torch.tensor([0.2, 0.5]).view(1, 1, 1, 2).repeat(5, 1, 1, 1)
    base = torch.zeros(5, dtype=torch.int64)
    return Searches(teacher, images, base, base + 1, teacher(images).detach())


def test_samples_are_moved_along_their_rays_to_the_boundary(searches):
    beyond, short, third, still, on = (0.8, 0.5), (0.4, 0.6), (0.55, 1.0), (0.2, 0.5), (0.5005, 0.5)
    samples = torch.tensor([beyond, short, third, still, on]).view(5, 1, 1, 2)
    moved = on_their_rays(searches.teacher, searches, samples)
    expected = torch.tensor([(0.5, 0.5), (0.5, 0.65), third, still, on]).view(5, 1, 1, 2)
    torch.testing.assert_close(moved, expected, atol=2e-3, rtol=0)  # 0.04 logits of a slope of 20
    margin = probability_margin(margin_of(searches.teacher(moved[:2]), searches.base[:2], searches.target[:2]))
    assert (margin <= TOLERANCE).all()


def test_only_what_is_there_has_a_distance(searches):
    beyond, short, third, still, on = (0.8, 0.5), (0.4, 0.6), (0.55, 1.0), (0.2, 0.5), (0.4999, 0.5)
    samples = torch.tensor([beyond, short, third, still, on]).view(5, 1, 1, 2)
    expected = torch.tensor([0.6, torch.inf, torch.inf, torch.inf, 0.2999])
    torch.testing.assert_close(distance_of(searches, samples), expected)
