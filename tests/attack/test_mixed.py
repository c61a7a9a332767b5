"""Samples put together from views, as shards have them: another view, mixup and CutMix, with the teacher's logits."""

import numpy as np
import pytest
import torch

from pipeline.attack.columns import Block, shard_values
from pipeline.core.errors import ParameterError
from pipeline.core.status import Status
from pipeline.images.views import Stream, apply_views, draw_views, uniforms
from tests.support.files import tiny_params
from tests.support.helpers import attack_parameters, random_prepared, searching, tiny_resnet, view_parameters

ROWS, TARGETS, VIEW, START = 24, 2, 1, 16
LEVEL = 1 / 254  # of the largest change of a sample: half a step of int8


@pytest.fixture(scope="module")
def split():
    return random_prepared(0, 60, model=tiny_resnet(0))


def made(split, name, rows=ROWS, start=START, seed=5):
    attack = attack_parameters(targets=TARGETS, seed=seed)
    block = Block(VIEW, 0, start, rows)
    return shard_values(searching(tiny_resnet(0), name=name), split, block, view_parameters(), attack)


def samples_in(values):
    images = values["image"][:, None].astype(np.float64) / 255
    return images + values["delta"].astype(np.float64) * values["delta_scale"][..., None, None, None]


def other_views(split, index):
    """The views that are drawn for each sample of the block, of the images of these rows."""
    rows = START * TARGETS, ROWS * TARGETS
    drawn = draw_views(5, VIEW, *rows, view_parameters(), (8, 8), (8, 8), Stream.OTHER_VIEWS)
    images = torch.from_numpy(split.images[index])
    views = apply_views(images, *drawn.on(torch.device("cpu")), 1, (8, 8))
    return views.numpy().reshape(ROWS, TARGETS, 1, 8, 8) / 255


def drawn_images():
    numbers = uniforms(5, Stream.OTHER_IMAGES, VIEW, START * TARGETS, ROWS * TARGETS, 1)[:, 0]
    return (numbers * 60).astype(int)


def usable(values):
    rows = values["status"] != Status.BASE_MISCLASSIFIED
    assert rows.mean() > 0.3
    return rows


def test_another_view_is_one_of_the_same_image(split):
    values = made(split, "view")
    expected = other_views(split, np.repeat(np.arange(START, START + ROWS), TARGETS))
    rows = usable(values)
    np.testing.assert_allclose(samples_in(values)[rows], expected[rows], atol=LEVEL)
    assert not np.allclose(samples_in(values)[rows], (values["image"][:, None] / 255 + 0 * expected)[rows], atol=0.1)


def test_mixup_lies_between_two_images_at_any_share(split):
    values = made(split, "mixup")
    rows, index = usable(values), drawn_images()
    assert len(set(index.tolist())) > 20
    assert index.max() >= START + ROWS  # of the whole split, not of the block
    image, other = values["image"][:, None] / 255 + np.zeros((1, TARGETS, 1, 1, 1)), other_views(split, index)
    way, moved = (
        (other - image)[rows].reshape(rows.sum(), -1),
        (samples_in(values) - image)[rows].reshape(rows.sum(), -1),
    )
    share = (way * moved).sum(1) / (way**2).sum(1)
    np.testing.assert_allclose(moved, share[:, None] * way, atol=LEVEL)
    assert share.min() > -0.01
    assert share.max() < 1.01
    assert share.min() < 0.2
    assert share.max() > 0.8
    assert abs(share.mean() - 0.5) < 0.25


def test_cutmix_is_a_box_of_another_image(split):
    values = made(split, "cutmix")
    rows = usable(values)
    image, other = values["image"][:, None] / 255 + np.zeros((1, TARGETS, 1, 1, 1)), other_views(split, drawn_images())
    sizes = []
    for sample, own, theirs in zip(samples_in(values)[rows], image[rows], other[rows], strict=True):
        changed = np.abs(sample - own)[0] > 3 * LEVEL
        if not changed.any():
            continue
        top, left = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
        box = np.zeros((8, 8), bool)
        box[top[0] : top[-1] + 1, left[0] : left[-1] + 1] = True
        np.testing.assert_allclose(sample[0][box], theirs[0][box], atol=2 * LEVEL)
        np.testing.assert_allclose(sample[0][~box], own[0][~box], atol=2 * LEVEL)
        sizes.append(box.mean())
    assert len(sizes) > 10
    assert min(sizes) < 0.3
    assert max(sizes) > 0.5


@pytest.mark.parametrize("name", ["view", "mixup", "cutmix"])
def test_the_teachers_logits_are_those_at_the_stored_sample(split, name):
    values = made(split, name)
    rows = usable(values)
    logits = tiny_resnet(0)(torch.from_numpy(samples_in(values)[rows]).float())
    np.testing.assert_allclose(values["boundary_logits"][rows], logits, rtol=1e-3, atol=1e-3)
    assert (values["evaluations"] == 0).all()
    assert set(np.unique(values["status"][rows])) <= {Status.CONVERGED, Status.NOT_CONVERGED, Status.THIRD_CLASS}
    assert (values["status"][rows] == Status.NOT_CONVERGED).mean() > 0.5


@pytest.mark.parametrize("name", ["view", "mixup", "cutmix"])
def test_samples_follow_from_their_seed(split, name):
    first, again, other = made(split, name), made(split, name), made(split, name, seed=6)
    assert all(np.array_equal(first[column], again[column]) for column in first)
    assert not np.array_equal(first["delta"], other["delta"])


def test_in_the_training_loop_there_are_none():
    with pytest.raises(ParameterError, match=r"'mixup' is for shards, but 'bss_online' searches in the loop"):
        tiny_params({"search.name": "mixup", "methods": ["original", "bss_online"]})
