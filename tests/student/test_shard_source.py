"""Sources of batches: what an epoch holds follows from (seed, epoch), wherever the data is kept."""

import dataclasses
import weakref
from collections import Counter
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import pipeline.shards.order
import pipeline.student.shard_source
from pipeline.core.errors import ShardError
from pipeline.core.status import Status
from pipeline.losses.bss import BssTerm
from pipeline.networks.fast import folded
from pipeline.search.boundary import judge
from pipeline.shards.reader import BoundaryShards
from pipeline.student.online_source import OnlineSource
from pipeline.student.shard_source import ShardSource
from pipeline.training.batches import Batch, FreshSource, TeacherBatch, batches_of
from tests.support.helpers import (
    CPU,
    attack_parameters,
    bss_parameters,
    make_shards,
    random_prepared,
    searching,
    tiny_resnet,
    view_parameters,
)

ROWS, VIEWS, TARGETS = 150, 3, 2  # in blocks of 16, the last of 6


@pytest.fixture(scope="module")
def teacher():
    return tiny_resnet(0)


@pytest.fixture(scope="module")
def train(teacher):
    return random_prepared(0, ROWS, model=teacher)


def shards_in(folder, train, teacher, **changes):
    # So few gradients that some searches come to no end.
    return BoundaryShards(make_shards(folder, train, teacher, attack_parameters(**changes), max_gradients=3))


@pytest.fixture(scope="module")
def shards(tmp_path_factory, train, teacher):
    return shards_in(tmp_path_factory.mktemp("embedded"), train, teacher)


@pytest.fixture(scope="module")
def shards_without_images(tmp_path_factory, train, teacher):
    return shards_in(tmp_path_factory.mktemp("bare"), train, teacher, embed_images=False)


@pytest.fixture(scope="module")
def stored(shards):
    """All rows of all shards, column by column, read with h5py alone, and the view of each row."""
    columns = {}
    for path in sorted(Path(shards.directory).glob("*.h5")):
        with h5py.File(path) as file:
            for name in file:
                columns.setdefault(name, []).append(file[name][:])
            columns.setdefault("view", []).append(np.full(len(file["index"]), file.attrs["view"]))
    return {name: np.concatenate(parts) for name, parts in columns.items()}


@pytest.fixture(scope="module")
def place_of(stored):
    """Positions in `stored` by the bytes of a view, which is how a batch shows what it holds.

    Where two views of an image were drawn alike, the later one stands for both.
    """
    return {image.tobytes(): place for place, image in enumerate(stored["image"])}


ON_BOUNDARY = BssTerm.statuses(bss_parameters(converged_only=True))
ALL_SEARCHES, NONE = BssTerm.statuses(bss_parameters(converged_only=False)), ()


def source_of(shards, seed=7, batch_size=32, statuses=ON_BOUNDARY, **options):
    return ShardSource(shards, seed, batch_size, CPU, statuses, **options)


def places_in(batch, place_of):
    pixels = (batch.images * 255).round().to(torch.uint8).numpy()
    return np.array([place_of[image.tobytes()] for image in pixels])


def values_of(whole):
    """The fields of a batch, or of boundary-supporting samples, that it has, by name."""
    values = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    return {name: value for name, value in values.items() if value is not None}


def everything_in(batch):
    """All tensors of a batch, with the boundary-supporting samples of its rows, backwards."""
    rows = torch.arange(len(batch.labels)).flip(0)
    values = values_of(batch)
    boundary = values.pop("boundary", None)
    return [*values.values(), *(values_of(boundary.samples_of(rows)).values() if boundary else [])]


def assert_same_batches(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert type(one) is type(other)
        for value, same in zip(everything_in(one), everything_in(other), strict=True):
            assert torch.equal(value, same)


def same_images(first, second):
    return all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))


# Shards


def test_the_dataset_is_worth_testing_with(stored, place_of):
    assert len(place_of) > 0.9 * ROWS * VIEWS
    status = stored["status"]
    assert status.shape == (ROWS * VIEWS, TARGETS)
    assert (status == Status.CONVERGED).mean() > 0.2
    assert (status == Status.BASE_MISCLASSIFIED).all(1).mean() > 0.05
    # Targets that were reached beside others that were not.
    assert ((status == Status.CONVERGED).sum(1) == 1).sum() > 10


@pytest.mark.parametrize("statuses", [NONE, ON_BOUNDARY, ALL_SEARCHES], ids=["none", "converged", "all"])
@pytest.mark.parametrize(("window", "batch_size"), [(None, 7), (None, 32), (1, 7), (1, 32), (3, 7), (3, 32), (4, 1000)])
def test_resident_and_streamed_batches_are_the_same(shards, monkeypatch, window, batch_size, statuses):
    if window:
        monkeypatch.setattr(pipeline.shards.order, "WINDOW_SHARDS", window)
    resident = source_of(shards, batch_size=batch_size, statuses=statuses, resident=True)
    streamed = source_of(shards, batch_size=batch_size, statuses=statuses, resident=False)
    for epoch in range(VIEWS + 1):
        assert_same_batches(resident.epoch(epoch), streamed.epoch(epoch))


def test_where_shards_are_kept_is_decided_by_free_memory_and_changes_nothing(shards, monkeypatch):
    expected = list(source_of(shards, resident=True).epoch(1))
    assert_same_batches(source_of(shards).epoch(1), expected)
    monkeypatch.setattr(pipeline.student.shard_source, "free_memory", lambda device: 0)
    reads = []
    source = source_of(shards)
    monkeypatch.setattr(source.shards, "read", lambda *a, read=source.shards.read: reads.append(a) or read(*a))
    assert_same_batches(source.epoch(1), expected)
    assert len(reads) == 10  # the blocks, under one view each


def test_resident_shards_take_their_own_bytes_and_those_of_one_shard(shards, monkeypatch):
    """Numbers of rows that are in memory at once while shards are loaded."""
    read, held = ShardSource._read, []

    def noted(source, entries):
        assert len(entries) == 1
        gone = [reference for reference in held if reference() is not None]
        assert len(gone) <= 1  # the columns of the shard before may still be named
        columns = read(source, entries)
        held.append(weakref.ref(columns["delta"]))
        return columns

    monkeypatch.setattr(ShardSource, "_read", noted)
    source = ShardSource(shards, 0, 32, CPU, ON_BOUNDARY, resident=True)
    assert len(held) == len(shards.manifest.shards) > 2
    assert source.is_resident


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("window", [2, 16])
def test_every_row_comes_once_an_epoch_and_every_view_once_in_as_many_epochs(
    shards, stored, place_of, monkeypatch, resident, window
):
    monkeypatch.setattr(pipeline.shards.order, "WINDOW_SHARDS", window)
    source = source_of(shards, resident=resident)
    assert source.rows == ROWS
    for cycle in range(2):
        seen = []
        for epoch in range(cycle * VIEWS, (cycle + 1) * VIEWS):
            batches = list(source.epoch(epoch))
            assert [len(batch.labels) for batch in batches] == [32, 32, 32, 32, 22]
            places = np.concatenate([places_in(batch, place_of) for batch in batches])
            assert sorted(stored["index"][places]) == list(range(ROWS))
            assert len(set(stored["view"][places])) > 1  # blocks are under views of their own
            seen.append(places)
        assert sorted(np.concatenate(seen)) == sorted(place_of[image.tobytes()] for image in stored["image"])


def test_rows_are_shuffled_across_blocks_and_differently_every_epoch(shards, stored, place_of):
    source = source_of(shards, batch_size=ROWS)
    orders = [stored["index"][places_in(batch, place_of)] for epoch in range(6) for batch in source.epoch(epoch)]
    for order in orders:
        assert len(set(order[:32] // 16)) >= 5  # of 10 blocks
    assert all((one != other).any() for one, other in pairwise(orders))


def test_usable_searches_are_those_that_ended_away_from_their_image():
    assert set(ON_BOUNDARY) == {Status.CONVERGED}
    assert set(ALL_SEARCHES) == {Status.CONVERGED, Status.NOT_CONVERGED, Status.THIRD_CLASS}


@pytest.mark.parametrize("statuses", [ON_BOUNDARY, ALL_SEARCHES], ids=["converged", "all"])
def test_batches_hold_what_the_shards_hold(shards, stored, place_of, statuses):
    copies = Counter(image.tobytes() for image in stored["image"])
    told_apart = np.array([copies[image.tobytes()] == 1 for image in stored["image"]])
    taken, ended = set(), set()
    for epoch in range(VIEWS):
        for batch in source_of(shards, batch_size=50, statuses=statuses).epoch(epoch):
            at = places_in(batch, place_of)
            np.testing.assert_array_equal(batch.images, stored["image"][at].astype(np.float32) / np.float32(255))
            np.testing.assert_array_equal(batch.labels, stored["label"][at])
            assert batch.images.dtype == batch.teacher_logits.dtype == torch.float32
            assert batch.labels.dtype == torch.int64
            known = np.flatnonzero(told_apart[at])
            wanted = np.isin(stored["status"][at], statuses)
            np.testing.assert_array_equal(batch.teacher_logits[known], stored["teacher_logits"][at[known]])
            np.testing.assert_array_equal(batch.usable[known], wanted[known].any(1))

            rows = np.random.default_rng(epoch).permutation(known)
            found = batch.boundary.samples_of(torch.from_numpy(rows))
            np.testing.assert_array_equal(found.usable, wanted[rows].any(1))
            for number, row in enumerate(rows):
                if found.usable[number]:
                    place = at[row]
                    k = target_taken(stored, place, found.samples[number], found.teacher_logits[number], statuses)
                    taken.add((wanted[row].all(), k))
                    ended.add(int(stored["status"][place, k]))
    # Where both targets can be used either is taken, else the one that can.
    assert {(True, 0), (True, 1)} <= taken
    if statuses == ON_BOUNDARY:
        assert taken == {(True, 0), (True, 1), (False, 0), (False, 1)}
    assert ended <= set(statuses)
    assert ended & {Status.CONVERGED, Status.NOT_CONVERGED} == set(statuses) & {Status.CONVERGED, Status.NOT_CONVERGED}


def target_taken(stored, place, sample, teacher_logits, statuses):
    """Which target's boundary-supporting sample this is; fails if it is none of those that can be used."""
    matches = []
    for k in range(TARGETS):
        expected = stored["image"][place] / 255 + stored["delta"][place, k] * float(stored["delta_scale"][place, k])
        logits = stored["boundary_logits"][place, k]
        if np.allclose(sample, expected, rtol=0, atol=1e-6) and np.array_equal(teacher_logits, logits):
            assert stored["status"][place, k] in statuses
            matches.append(k)
    assert len(matches) == 1
    return matches[0]


def test_a_boundary_sample_is_given_again_when_it_is_asked_for_again(shards):
    batch = next(source_of(shards).epoch(0))
    rows = torch.tensor([9, 3, 3, 17])  # any rows, in any order
    first, second = batch.boundary.samples_of(rows), batch.boundary.samples_of(torch.arange(32))
    for name, value in values_of(first).items():
        assert torch.equal(value, getattr(second, name)[rows]), name


def test_without_boundary_there_are_no_boundary_samples(shards):
    batches = list(source_of(shards, statuses=NONE).epoch(0))
    assert all(type(batch) is TeacherBatch for batch in batches)
    assert same_images(batches, source_of(shards).epoch(0))


@pytest.mark.parametrize("resident", [True, False])
def test_an_epoch_follows_from_seed_and_epoch_alone(shards, resident):
    fresh = source_of(shards, resident=resident)
    used = source_of(shards, resident=resident)
    for epoch in (0, 1, 2):
        for _ in used.epoch(epoch):
            pass
    next(used.epoch(4))  # left after its first batch
    assert_same_batches(used.epoch(3), fresh.epoch(3))
    assert_same_batches(used.epoch(3), fresh.epoch(3))
    # Two epochs at a time do not disturb each other.
    for one, other in zip(used.epoch(2), used.epoch(2), strict=True):
        assert torch.equal(one.images, other.images)


def test_other_seeds_and_epochs_give_other_batches(shards):
    source = source_of(shards, seed=7)
    assert not same_images(source.epoch(0), source.epoch(1))
    assert not same_images(source.epoch(0), source.epoch(VIEWS))
    assert not same_images(source.epoch(0), source_of(shards, seed=8).epoch(0))


@pytest.mark.parametrize("resident", [True, False])
def test_shards_without_images_and_the_training_data_give_the_same_batches(
    shards, shards_without_images, train, resident
):
    assert "image" not in shards_without_images.manifest.columns
    bare = source_of(shards_without_images, train=train, resident=resident)
    embedded = source_of(shards, resident=resident)
    for epoch in range(VIEWS):
        assert_same_batches(bare.epoch(epoch), embedded.epoch(epoch))


def test_shards_without_images_need_the_training_data_they_were_made_from(shards_without_images, teacher):
    with pytest.raises(ShardError, match=r"do not embed their images.*prepared training data is needed"):
        source_of(shards_without_images)
    with pytest.raises(ShardError, match="made from other training data"):
        source_of(shards_without_images, train=random_prepared(1, ROWS, model=teacher))
    known = shards_without_images.manifest.digests.train
    with pytest.raises(ShardError, match="its views are not of images as large as the training data's"):
        source_of(shards_without_images, train=random_prepared(1, ROWS, shape=(1, 6, 6))._replace(digest=known))


# Fresh views


def fresh_source(train, padding=1, flip=True, seed=3, batch_size=32):
    return FreshSource(train, view_parameters(padding=padding, flip=flip), seed, batch_size, CPU)


def test_fresh_views_hold_every_row_once(train):
    source = fresh_source(train)
    assert source.rows == ROWS
    for epoch in range(3):
        order = source.drawn(source.seed, epoch).order
        indices = [order[part] for part in batches_of(ROWS, 32)]
        assert sorted(np.concatenate(indices)) == list(range(ROWS))
        assert [len(index) for index in indices] == [32, 32, 32, 32, 22]
        for index, batch in zip(indices, source.epoch(epoch), strict=True):
            np.testing.assert_array_equal(batch.labels, train.labels[index])


def test_fresh_views_without_padding_and_flip_are_the_images(train):
    source = fresh_source(train, padding=0, flip=False)
    order = source.drawn(source.seed, 0).order
    for part, batch in zip(batches_of(ROWS, 32), source.epoch(0), strict=True):
        index = order[part]
        np.testing.assert_array_equal(batch.images, train.images[index].astype(np.float32) / np.float32(255))
        assert type(batch) is Batch  # which knows no teacher


def test_fresh_views_follow_from_seed_and_epoch_alone(train):
    used = fresh_source(train)
    for _ in used.epoch(0):
        pass
    assert_same_batches(used.epoch(1), fresh_source(train).epoch(1))
    assert not same_images(used.epoch(0), used.epoch(1))
    assert not same_images(used.epoch(0), fresh_source(train, seed=4).epoch(0))


def test_fresh_views_come_in_another_order_and_are_cut_in_another_way_every_epoch(train):
    source = fresh_source(train)
    orders, views = [], []
    for epoch in range(2):
        orders.append(source.drawn(source.seed, epoch).order)
        views.append(torch.cat([batch.images for batch in source.epoch(epoch)])[np.argsort(orders[-1])])
    assert (orders[0] != orders[1]).mean() > 0.9
    # Of 3 x 3 crops and 2 mirrors, 1 in 18 repeats by chance.
    assert (views[0] != views[1]).any((1, 2, 3)).double().mean() > 0.8


# The teacher in the loop


@pytest.fixture
def online(train, teacher):
    search = searching(tiny_resnet(0))
    return OnlineSource(fresh_source(train), search, ON_BOUNDARY)


def test_online_batches_are_fresh_views_with_the_teachers_logits(online, train, teacher):
    assert online.rows == ROWS
    assert same_images(online.epoch(1), fresh_source(train).epoch(1))
    labels = torch.cat([batch.labels for batch in online.epoch(1)])
    assert labels.sort().values.tolist() == sorted(train.labels)
    for batch in online.epoch(1):
        torch.testing.assert_close(batch.teacher_logits, teacher(batch.images))


def test_online_boundary_samples_are_on_the_teachers_boundary(online, teacher):
    usable = 0
    for batch in online.epoch(0):
        right = (batch.teacher_logits.argmax(1) == batch.labels).nonzero()[:, 0]
        assert batch.usable[right].all()
        found = batch.boundary.samples_of(right)
        logits = teacher(found.samples)
        torch.testing.assert_close(found.teacher_logits, logits, rtol=0, atol=1e-4)
        top = logits.argsort(1, descending=True)[:, :2]
        base = batch.labels[right]
        other = torch.where(top[:, 0] == base, top[:, 1], top[:, 0])
        on_boundary = judge(logits, base, other, 0.02) == Status.CONVERGED
        assert on_boundary[found.usable].all()
        usable += int(found.usable.sum())
    assert usable > ROWS / 4


@pytest.mark.parametrize("statuses", [ON_BOUNDARY, ALL_SEARCHES], ids=["converged", "all"])
def test_online_samples_are_used_by_how_their_search_ended(train, statuses):
    # Searches of few gradients, some of which come to no end.
    search, ended = searching(tiny_resnet(0), max_gradients=2), []

    def spied(problem):
        result = search.search(problem)
        ended.append(result.status)
        return result

    batches = OnlineSource(fresh_source(train), dataclasses.replace(search, search=spied), statuses).epoch(0)
    kept = [batch.boundary.samples_of(torch.arange(len(batch.labels))).usable for batch in batches]
    status = torch.cat(ended).numpy()
    assert {Status.CONVERGED, Status.NOT_CONVERGED, Status.BASE_MISCLASSIFIED} <= set(status.tolist())
    np.testing.assert_array_equal(torch.cat(kept), np.isin(status, statuses))


def test_random_noise_online_follows_from_seed_epoch_and_step(train):
    def samples(seed=3, epoch=0):
        """The noise of each batch, on images that the teacher gets right, and what it was drawn from."""
        search, draws = searching(tiny_resnet(0), name="random"), []
        spied = dataclasses.replace(search, search=lambda problem: draws.append(problem.draw) or search.search(problem))
        source = OnlineSource(fresh_source(train, padding=0, flip=False, seed=seed), spied, ALL_SEARCHES)
        batches = list(source.epoch(epoch))
        noise = [batch.boundary.samples_of(torch.arange(len(batch.labels))).samples - batch.images for batch in batches]
        assert all((each != 0).any((1, 2, 3)).float().mean() > 0.9 for each in noise)
        return noise, draws

    first, draws = samples()
    again, other = samples()[0], [samples(seed=4), samples(epoch=1)]
    assert all(torch.equal(one, same) for one, same in zip(first, again, strict=True))
    everything = draws + other[0][1] + other[1][1]
    assert len(set(everything)) == len(everything) == 3 * len(first)


def test_online_batches_repeat_for_the_same_seed_and_epoch(online, train):
    other = OnlineSource(fresh_source(train), online.search, ON_BOUNDARY)
    assert_same_batches(online.epoch(1), other.epoch(1))
    assert_same_batches(online.epoch(1), other.epoch(1))
    assert not same_images(online.epoch(0), online.epoch(1))
    assert not same_images(
        online.epoch(0), OnlineSource(fresh_source(train, seed=4), online.search, ON_BOUNDARY).epoch(0)
    )
    # What was asked for before changes nothing either.
    (first, *_), (second, *_) = list(online.epoch(2)), list(other.epoch(2))
    first.boundary.samples_of(torch.arange(20))
    rows = torch.tensor([5, 1])
    same = second.boundary.samples_of(rows)
    for name, value in values_of(first.boundary.samples_of(rows)).items():
        assert torch.equal(value, getattr(same, name)), name


def test_a_search_leaves_the_teacher_as_it_is(teacher):
    model = tiny_resnet(0)
    search = searching(model)
    train = random_prepared(2, 20, model=teacher)
    for batch in OnlineSource(fresh_source(train), search, ON_BOUNDARY).epoch(0):
        batch.boundary.samples_of(torch.arange(20))
    for (name, value), same in zip(model.state_dict().items(), teacher.state_dict().values(), strict=True):
        assert torch.equal(value, same), name
    assert not model.training
    assert not any(parameter.requires_grad for parameter in folded(model).parameters())
