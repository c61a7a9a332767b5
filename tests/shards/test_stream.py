"""Streams that are broken off and go on: every row of the epoch once, whoever reads it before and after."""

import io
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import pipeline.shards.stream
from pipeline.core.provenance import ROOT
from pipeline.shards.stream import StreamedShards
from tests.support.files import make_missing, mislabelled, sample_dataset, tiny_splits
from tests.support.web import served

WORKERS = (0, 1, 2, 4)
SIZE = 5  # of a batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of 3 views of 64 images, in blocks of 12 rows, the last of 4."""
    directory = tmp_path_factory.mktemp("made")
    changes = {"attack.views": 3, "attack.rows_per_shard": 12}
    dataset = sample_dataset(directory, mislabelled(tiny_splits()["train"]), changes)
    make_missing(dataset, directory)
    dataset.publish(directory / "bss")
    return directory / "bss"


def stream_of(folder, all_views=False, **options):
    return StreamedShards(folder, seed=7, all_views=all_views, buffer_shards=2, verify=False, **options)


def keys_of(row):
    """What tells rows, or those of a batch, apart."""
    logits = row["teacher_logits"].reshape(-1, row["teacher_logits"].shape[-1])
    return list(zip(row["index"].reshape(-1).tolist(), map(tuple, logits.tolist()), strict=True))


def kind(workers, batch_size=SIZE, drop_last=False):
    """What a stream asks a loader about itself."""
    return SimpleNamespace(num_workers=workers, batch_size=batch_size, drop_last=drop_last)


def modelled(stream, loader):
    """The batches of a loader, by a model of it in this process: its workers take turns."""
    shares = []
    for number in range(max(1, loader.num_workers)):
        worker = SimpleNamespace(id=number, num_workers=loader.num_workers) if loader.num_workers else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline.shards.stream, "get_worker_info", lambda worker=worker: worker)
            rows = [key for row in stream for key in keys_of(row)]
        batches = [rows[start : start + loader.batch_size] for start in range(0, len(rows), loader.batch_size)]
        shares.append([each for each in batches if len(each) == loader.batch_size or not loader.drop_last])
    turns = itertools.zip_longest(*shares)
    return [batch for turn in turns for batch in turn if batch is not None]


def rows_of(batches):
    return [key for batch in batches for key in batch]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("workers", WORKERS)
def test_workers_of_a_loader_take_turns(folder, workers, drop_last):
    stream = stream_of(folder, all_views=True)
    expected = modelled(stream, kind(workers, drop_last=drop_last))
    loader = DataLoader(stream, SIZE, num_workers=workers, drop_last=drop_last)
    assert [keys_of(batch) for batch in loader] == expected


@pytest.mark.parametrize("all_views", [False, True])
@pytest.mark.parametrize(("before", "after"), itertools.product(WORKERS, WORKERS))
def test_an_epoch_goes_on_with_the_rows_that_are_left(folder, before, after, all_views):
    whole = modelled(stream_of(folder, all_views), kind(before))
    for done in (0, 1, 2, 3, len(whole) // 2, len(whole) - 3, len(whole) - 1, len(whole)):
        state = stream_of(folder, all_views).state_dict(kind(before), done)
        stream = stream_of(folder, all_views)
        stream.load_state_dict(state)
        rest = modelled(stream, kind(after))
        assert sorted(rows_of(whole[:done]) + rows_of(rest)) == sorted(rows_of(whole)), done
        if before == after:
            assert rest == whole[done:], done


@pytest.mark.parametrize("workers", itertools.permutations(WORKERS, 3))
def test_an_epoch_that_was_broken_off_twice(folder, workers):
    seen, state = [], stream_of(folder).state_dict(kind(2), 0)
    for number, done in zip(workers, (3, 4, 1000), strict=True):
        stream = stream_of(folder)
        stream.load_state_dict(state)
        batches = modelled(stream, kind(number, batch_size=3))
        seen += rows_of(batches[:done])
        state = stream.state_dict(kind(number, batch_size=3), min(done, len(batches)))
    assert sorted(index for index, _ in seen) == list(range(64))
    assert sorted(seen) == sorted(rows_of(modelled(stream_of(folder), kind(0))))
    stream.load_state_dict(state)
    assert modelled(stream, kind(4)) == []


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (3, 2), (2, 2)])
@pytest.mark.parametrize("workers", [(0, 0), (2, 2), (2, 1)])
def test_processes_share_what_is_left(folder, before, after, workers):
    def shared(world_size, rank, state=None):
        stream = stream_of(folder, all_views=True, rank=rank, world_size=world_size)
        if state is not None:
            stream.load_state_dict(state)
        return stream

    seen, whole = [], rows_of(modelled(stream_of(folder, all_views=True), kind(0)))
    for rank in range(before):
        seen += rows_of(modelled(shared(before, rank), kind(workers[0]))[:4])
    states = [shared(before, rank).state_dict(kind(workers[0]), 4) for rank in range(before)]
    assert all(state == states[0] for state in states)  # that of one process is that of all
    for rank in range(after):
        seen += rows_of(modelled(shared(after, rank, states[0]), kind(workers[1])))
    assert sorted(seen) == sorted(whole)


def test_batches_that_were_dropped_come_when_the_epoch_goes_on(folder):
    loader = kind(4, batch_size=7, drop_last=True)
    whole = modelled(stream_of(folder), loader)
    state = stream_of(folder).state_dict(loader, len(whole))
    stream = stream_of(folder)
    stream.load_state_dict(state)
    assert sorted(index for index, _ in rows_of(whole + modelled(stream, kind(2)))) == list(range(64))


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 4), (4, 0), (2, 2)])
def test_loaders_go_on(folder, before, after):
    stream = stream_of(folder)
    stream.set_epoch(1)
    loader = DataLoader(stream, SIZE, num_workers=before)
    seen = []
    for done, batch in enumerate(loader, 1):
        seen += keys_of(batch)
        if done == 4:
            state = stream.state_dict(loader, done)
            break
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file) == state == json.loads(json.dumps(state))

    other = stream_of(folder)
    other.load_state_dict(json.loads(json.dumps(state)))
    loader = DataLoader(other, 3, num_workers=after, persistent_workers=after > 0)
    other.set_epoch(state["epoch"])  # as a loop over epochs does
    seen += [key for batch in loader for key in keys_of(batch)]
    assert sorted(seen) == sorted(rows_of(modelled(stream, kind(0))))
    other.set_epoch(2)
    assert sorted(index for batch in loader for index in batch["index"].tolist()) == list(range(64))


def test_a_stream_behind_a_url_goes_on(folder):
    with served(folder.parent) as url:
        stream = stream_of(f"{url}/bss", all_views=True)
        state = stream.state_dict(kind(2), 7)
        seen = rows_of(modelled(stream, kind(2))[:7])
        stream.load_state_dict(state)
        assert stream_of(folder, all_views=True).state_dict(kind(2), 7) == state
        loader = DataLoader(stream, SIZE, num_workers=2, multiprocessing_context="spawn")
        seen += [key for batch in loader for key in keys_of(batch)]
    assert sorted(seen) == sorted(rows_of(modelled(stream_of(folder, all_views=True), kind(0))))


def test_without_workers_the_stream_counts_for_itself(folder):
    whole = rows_of(modelled(stream_of(folder), kind(0)))
    stream = stream_of(folder)
    start = stream.state_dict()
    for done, _ in enumerate(stream, 1):
        if done == 23:
            break
    alone = stream.state_dict()
    loader = DataLoader(stream, 8)
    for done, _ in enumerate(loader, 1):
        if done == 3:
            break
    assert alone["runs"] == [[[0, 23]]]
    assert stream.state_dict() == stream.state_dict(loader, 3) != start
    stream.load_state_dict(alone)
    assert stream.state_dict() == alone
    assert rows_of(modelled(stream, kind(0))) == whole[23:]
    assert stream.state_dict()["runs"] == [[[0, 64]]]
    stream.set_epoch(1)
    assert stream.state_dict()["runs"] == [[[0, 0]]]
    assert len(list(stream)) == 64


class Told(IterableDataset):
    """Rows with the state of their stream behind them, as torchdata's StatefulDataLoader asks for it in workers."""

    def __init__(self, stream, states=None):
        self.stream, self.states = stream, states

    def __iter__(self):
        if self.states:
            self.stream.load_state_dict(self.states[get_worker_info().id])
        for row in self.stream:
            yield keys_of(row)[0], get_worker_info().id, self.stream.state_dict()


def test_workers_say_how_far_they_are(folder):
    whole = [each[0] for each in DataLoader(Told(stream_of(folder)), None, num_workers=2)]
    seen, states = [], {}
    for key, worker, state in itertools.islice(DataLoader(Told(stream_of(folder)), None, num_workers=2), 20):
        seen.append(key)
        states[worker] = state
    rest = DataLoader(Told(stream_of(folder), states), None, num_workers=2)
    assert seen + [each[0] for each in rest] == whole
    stream = stream_of(folder)
    stream.load_state_dict(states[0])
    with pytest.raises(ValueError, match="one of 2 workers: go on with as many"):
        list(stream)
    with pytest.raises(ValueError, match="the state is that of one worker"):
        stream.state_dict(kind(2), 1)


def test_what_cannot_be_known_is_refused(folder):
    stream = stream_of(folder)
    loader = DataLoader(stream, SIZE, num_workers=2)
    next(iter(loader))
    with pytest.raises(ValueError, match="expected both, since workers of a DataLoader read ahead"):
        stream.state_dict()
    with pytest.raises(ValueError, match="expected both, or neither"):
        stream.state_dict(loader)
    with pytest.raises(ValueError, match="batches: expected 0 to 14, got 15"):
        stream.state_dict(loader, 15)
    with pytest.raises(ValueError, match="in_order=True"):
        stream.state_dict(DataLoader(stream, SIZE, num_workers=2, in_order=False), 1)
    state = stream.state_dict(loader, 1)
    for name, value in (("seed", 8), ("all_views", True), ("buffer_shards", 3), ("dataset", "0" * 64)):
        with pytest.raises(ValueError, match=f"{name}: the state is of {value}, this stream has"):
            stream.load_state_dict(state | {name: value})


def test_the_example_of_the_page_goes_on(folder, monkeypatch):
    text = (ROOT / "docs/SHARING.md").read_text()
    example = text.split("<!-- example: going on -->\n```python\n")[1].split("```")[0]
    monkeypatch.setenv("SAMPLES", str(folder))
    values = {}
    exec(example, values)
    assert sorted(values["first"] + values["rest"]) == list(range(64))
    assert values["first"]
