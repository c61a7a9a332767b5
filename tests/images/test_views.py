"""Views and target classes: drawn from a counter, so every row has its own numbers whatever is drawn beside it."""

import numpy as np
import pytest
import torch

from pipeline.images.views import Stream, apply_views, draw_views, uniforms
from pipeline.search.targets import draw_targets
from tests.support.helpers import view_parameters


@pytest.mark.parametrize("width", [1, 3, 4, 5, 10])
@pytest.mark.parametrize(("start", "rows"), [(0, 1), (0, 40), (7, 1), (13, 20), (39, 1)])
def test_any_range_of_rows_is_a_slice_of_the_whole(width, start, rows):
    whole = uniforms(3, Stream.TARGETS, 2, 0, 40, width)
    part = uniforms(3, Stream.TARGETS, 2, start, rows, width)
    assert part.shape == (rows, width)
    np.testing.assert_array_equal(part, whole[start : start + rows])


def test_rows_far_out_are_reached_without_drawing_what_is_before():
    start = 10**15
    np.testing.assert_array_equal(
        uniforms(0, Stream.VIEWS, 0, start, 5, 3)[2:], uniforms(0, Stream.VIEWS, 0, start + 2, 3, 3)
    )


def test_every_seed_stream_and_view_has_its_own_numbers():
    keys = [(seed, stream, view) for seed in (0, 1, 2**31 - 1) for stream in Stream for view in (0, 1, 2, 1000)]
    drawn = np.stack([uniforms(*key, 0, 8, 4).ravel() for key in keys])
    assert len(keys) == 72
    assert len(np.unique(drawn)) == drawn.size  # 53 bits each: not one number in common
    np.testing.assert_array_equal(uniforms(*keys[-1], 0, 8, 4).ravel(), drawn[-1])


def test_uniforms_are_uniform_and_uncorrelated():
    numbers = uniforms(0, Stream.VIEWS, 0, 0, 20_000, 3)
    assert numbers.dtype == np.float64
    assert ((numbers >= 0) & (numbers < 1)).all()
    # Five standard errors of each mean.
    assert np.abs(numbers.mean(0) - 1 / 2).max() < 5 * np.sqrt(1 / 12 / 20_000)
    assert np.abs((numbers**2).mean(0) - 1 / 3).max() < 5 * np.sqrt(4 / 45 / 20_000)
    correlations = np.corrcoef(np.concatenate([numbers[:-1], numbers[1:]], 1).T)  # columns and neighbouring rows
    assert np.abs(correlations - np.eye(6)).max() < 5 / np.sqrt(20_000)
    # Twenty bins of each column: chi-square with 19 degrees of freedom is above 50 once in 10,000.
    for column in numbers.T:
        counts = np.histogram(column, 20, (0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 50


def drawn(seed, view, start, rows, stream=Stream.VIEWS, **rule):
    return draw_views(seed, view, start, rows, view_parameters(**rule), (8, 8), (8, 8), stream)


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crops_reach_every_offset_and_half_of_the_views_are_mirrored(padding):
    crop, flip, colour = drawn(1, 0, 0, 4000, padding=padding, flip=True)
    assert crop.shape == (4000, 2)
    assert crop.dtype == np.int16
    assert colour.shape == (4000, 0)
    assert flip.dtype == np.uint8
    offsets = 2 * padding + 1
    counts = np.zeros((offsets, offsets))
    np.add.at(counts, (crop[:, 0], crop[:, 1]), 1)
    expected = 4000 / offsets**2
    # Within five standard errors, for each pair of offsets and for the share of mirror images.
    assert np.abs(counts - expected).max() <= 5 * np.sqrt(expected)
    assert set(flip.tolist()) == {0, 1}
    assert abs(flip.mean() - 0.5) < 5 * 0.5 / np.sqrt(4000)


def test_without_flip_nothing_is_mirrored_and_the_crops_stay():
    with_flip = drawn(1, 3, 0, 200, padding=2, flip=True)
    without = drawn(1, 3, 0, 200, padding=2, flip=False)
    assert without.flip.dtype == np.uint8
    assert not without.flip.any()
    np.testing.assert_array_equal(without.crop, with_flip.crop)


def test_views_of_a_block_are_those_of_the_whole():
    whole = drawn(1, 3, 0, 50, padding=2, flip=True)
    block = drawn(1, 3, 16, 16, padding=2, flip=True)
    np.testing.assert_array_equal(block.crop, whole.crop[16:32])
    np.testing.assert_array_equal(block.flip, whole.flip[16:32])


def test_fresh_views_are_other_views():
    stored = drawn(1, 0, 0, 100, padding=4, flip=True)
    fresh = drawn(1, 0, 0, 100, padding=4, flip=True, stream=Stream.FRESH_VIEWS)
    assert (stored.crop != fresh.crop).any()
    assert (stored.flip != fresh.flip).any()


def views_by_loop(images, crop, flip, padding):
    count, channels, height, width = images.shape
    views = np.zeros_like(images)
    for row in range(count):
        for channel in range(channels):
            padded = np.zeros((height + 2 * padding, width + 2 * padding), images.dtype)
            padded[padding : padding + height, padding : padding + width] = images[row, channel]
            top, left = crop[row]
            view = padded[top : top + height, left : left + width]
            views[row, channel] = view[:, ::-1] if flip[row] else view
    return views


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 5, 9), (2, 9, 4), (1, 1, 1)])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_views_are_cut_out_of_padded_images(shape, padding, dtype):
    images = np.random.default_rng(0).integers(1, 256, (30, *shape)).astype(dtype)
    parameters = drawn(2, 1, 0, 30, padding=padding, flip=True)
    views = apply_views(torch.from_numpy(images), *parameters.on(torch.device("cpu")), padding, shape[1:])
    np.testing.assert_array_equal(views.numpy(), views_by_loop(images, *parameters[:2], padding))
    assert views.numpy().dtype == dtype


def test_the_middle_crop_is_the_image():
    images = torch.arange(24, dtype=torch.uint8).view(2, 1, 3, 4)
    middle = torch.full((2, 2), 3, dtype=torch.int16)
    views = apply_views(images, middle, torch.tensor([0, 1]), torch.empty(2, 0), padding=3, size=(3, 4))
    assert torch.equal(views[0], images[0])
    assert torch.equal(views[1], images[1].flip(-1))


# Target classes


def noise_for(rows, classes, seed=0):
    return uniforms(seed, Stream.TARGETS, 0, 0, rows, classes)


@pytest.mark.parametrize("targets", [1, 2, 5])
def test_target_classes_are_distinct_and_never_the_base_class(targets):
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(500, 6)).astype(np.float32) * 3
    labels = generator.integers(0, 6, 500)
    drawn = draw_targets(logits, labels, noise_for(500, 6), targets)
    assert drawn.shape == (500, targets)
    assert ((drawn >= 0) & (drawn < 6)).all()
    assert not (drawn == labels[:, None]).any()
    assert all(len(set(row)) == targets for row in drawn.tolist())


def test_more_targets_begin_with_the_same():
    logits = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    labels, noise = np.zeros(50, np.int64), noise_for(50, 6)
    np.testing.assert_array_equal(draw_targets(logits, labels, noise, 4)[:, :2], draw_targets(logits, labels, noise, 2))


# Chi-square quantiles at 0.9999, by degrees of freedom.
CHI_SQUARE = {3: 21.1, 11: 37.4}


@pytest.mark.parametrize("base_logit", [0.0, 5.0, 1000.0])
def test_target_classes_follow_the_softmax_without_the_base_class(base_logit):
    # With 1000, the softmax of all classes has no other than the base class left, in float64 too.
    others = np.array([0.0, 1.0, -1.0, 0.5])
    logits = np.insert(others, 2, base_logit).astype(np.float32)
    rows = 20_000
    drawn = draw_targets(np.tile(logits, (rows, 1)), np.full(rows, 2), noise_for(rows, 5), 1)[:, 0]
    counts = np.bincount(drawn, minlength=5)
    assert counts[2] == 0
    expected = rows * np.exp(others) / np.exp(others).sum()
    assert ((np.delete(counts, 2) - expected) ** 2 / expected).sum() < CHI_SQUARE[3]


def test_pairs_of_target_classes_follow_the_softmax_drawn_without_replacement():
    others = np.array([0.0, 1.0, -0.5, 0.5])
    weight = np.exp(others) / np.exp(others).sum()
    rows = 20_000
    logits = np.tile(np.append(others, 30.0).astype(np.float32), (rows, 1))
    drawn = draw_targets(logits, np.full(rows, 4), noise_for(rows, 5, seed=1), 2)
    statistic, cells = 0.0, 0
    for first in range(4):
        for second in range(4):
            if first == second:
                continue
            expected = rows * weight[first] * weight[second] / (1 - weight[first])
            count = np.count_nonzero((drawn == (first, second)).all(1))
            statistic += (count - expected) ** 2 / expected
            cells += 1
    assert statistic < CHI_SQUARE[cells - 1]


@pytest.mark.parametrize("extreme", [0.0, 1 - 2.0**-52])
def test_extreme_noise_is_no_exception(extreme):
    logits = np.array([[9.0, 1.0, 2.0, 3.0]], np.float32)
    drawn = draw_targets(logits, np.array([0]), np.full((1, 4), extreme), 3)
    assert drawn.tolist() == [[3, 2, 1]]


def test_a_class_of_probability_zero_still_comes_before_the_base_class():
    logits = np.array([[5.0, -np.inf, 1.0]], np.float32)
    for noise in (0.0, 0.5, 1 - 2.0**-53):
        drawn = draw_targets(logits, np.array([0]), np.full((1, 3), noise), 2)
        assert drawn.tolist() == [[2, 1]]


def test_no_rows_are_no_numbers():
    assert uniforms(0, Stream.VIEWS, 0, 5, 0, 3).shape == (0, 3)
