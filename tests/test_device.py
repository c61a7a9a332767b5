"""Searches, training and evaluation on a GPU: as on the CPU, and how often they use it; on a pretended one."""

import dataclasses
import json
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import pipeline.attack.dataset as attack_dataset
import pipeline.search.newton
from pipeline.attack.columns import Block, shard_values
from pipeline.attack.dataset import SampleDataset, shards_at_once
from pipeline.core.errors import StoreError
from pipeline.core.status import Status
from pipeline.core.store import Store
from pipeline.evaluate.compare import compare, teacher_side
from pipeline.images.pixels import pixels
from pipeline.machine.processes import Processes
from pipeline.networks import fast
from pipeline.networks.classifier import move_to_
from pipeline.networks.fast import folded, frozen, halved
from pipeline.networks.weights import load_weights, save_weights
from pipeline.search.table import SEARCHES, search_of
from pipeline.shards.file import read_columns
from pipeline.shards.reader import BoundaryShards
from pipeline.student.inputs import StudentInputs
from pipeline.student.run import StudentRun
from pipeline.student.shard_source import ShardSource
from pipeline.training import fit
from pipeline.training.batches import FreshSource
from tests.support.files import sample_dataset, tiny_params, tiny_splits, tiny_teacher
from tests.support.helpers import (
    CPU,
    attack_parameters,
    make_shards,
    random_prepared,
    search_parameters,
    tiny_resnet,
    view_parameters,
)
from tests.support.pretended_gpu import DEVICE, METHODS_OF_DEVICE, PretendedGpu

EXPECTED = json.loads(Path(__file__).with_name("device_counts.json").read_text())
METHODS = tiny_params().method


@pytest.fixture
def gpu():
    with PretendedGpu() as gpu:
        yield gpu


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    """Gradients in bfloat16 on either device, whatever this machine has."""
    monkeypatch.setattr(fast, "_has_bfloat16", lambda device: True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of tiny images with one target class and with two, and their teacher."""
    folder = tmp_path_factory.mktemp("device")
    for targets in (1, 2):
        attack = attack_parameters(targets=targets, rows_per_shard=8)
        make_shards(folder / f"targets-{targets}", tiny_splits()["train"], tiny_teacher(), attack)
    save_weights(tiny_teacher(), folder / "teacher.safetensors")
    return folder


# Searches


def columns_found(name, device):
    """The columns of a shard, and the search's networks."""
    train = tiny_splits()["train"]
    search = search_of(tiny_teacher(), search_parameters(name=name, max_gradients=6), 32, device)
    return shard_values(search, train, Block(1, 0, 0, 32), view_parameters(), attack_parameters())


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_finds_what_it_finds_on_the_cpu(name):
    expected = columns_found(name, CPU)
    with PretendedGpu() as gpu:
        found = columns_found(name, DEVICE)
        assert gpu.kernels.total() > 50
    assert {name: (column.dtype, column.shape) for name, column in found.items()} == {
        name: (column.dtype, column.shape) for name, column in expected.items()
    }
    for column in ("index", "label", "image", "crop", "flip"):
        np.testing.assert_array_equal(found[column], expected[column])
    np.testing.assert_allclose(found["teacher_logits"], expected["teacher_logits"], atol=1e-4)
    same = (found["status"] == expected["status"]) & (found["target"] == expected["target"])
    assert same.mean() > 0.95
    assert (expected["status"] != Status.BASE_MISCLASSIFIED).mean() > 0.5
    near = np.abs(found["distance"] - expected["distance"]) <= 0.01 * expected["distance"]
    assert near[same].mean() > 0.95


# Counts


def assert_as_expected(what, counts):
    """Compare kernels and host waits with those in device_counts.json, which change with the code alone."""
    expected = EXPECTED["counts"][what]
    if not torch.__version__.startswith(EXPECTED["torch"]):  # which has its own number of kernels for an operator
        counts, expected = counts[1:], expected[1:]
    better = all(count <= limit for count, limit in zip(counts, expected, strict=True))
    advice = "lower" if better else "it may not raise them unseen: mend it, or say why and change"
    assert list(counts) == expected, f"{what}: {advice} the numbers in tests/device_counts.json"


@pytest.fixture(scope="module")
def search_counts():
    """The most kernels and host waits of one call of each phase of the default search, and between two of them."""
    counts = {}

    def note(phase, kernels, waits):
        counts.setdefault(phase, []).append((kernels, waits))

    def counted(phase, step):
        def run(rows, network, limits):
            before = gpu.counts()
            if last:
                note("search, between", *np.subtract(before, last.pop()))
            result = step(rows, network, limits)
            last.append(gpu.counts())
            note(f"search, {phase}", *np.subtract(last[0], before))
            return result

        return run

    last = []
    with PretendedGpu() as gpu, pytest.MonkeyPatch.context() as patch:
        for phase in ("walk", "close", "sidestep"):
            patch.setattr(pipeline.search.newton, phase, counted(phase, getattr(pipeline.search.newton, phase)))
        columns_found("newton", DEVICE)
    return {phase: tuple(int(number) for number in np.max(each, 0)) for phase, each in counts.items()}


@pytest.mark.parametrize("phase", ["search, walk", "search, close", "search, sidestep", "search, between"])
def test_a_search_asks_no_more_of_the_device(search_counts, phase):
    assert_as_expected(phase, search_counts[phase])


# Several shards at once


def dataset_of(folder, rows_per_shard=8, name="newton"):
    changes = {"attack.rows_per_shard": rows_per_shard, "search.name": name, "search.max_gradients": 6}
    return sample_dataset(folder, tiny_splits()["train"], changes)


def columns_in(dataset):
    return [
        read_columns(dataset.store.path(dataset.stored_name(block)), ["status", "target", "distance", "image"])
        for block in dataset.blocks
    ]


def searching_on(device, name="newton"):
    return search_of(tiny_teacher(), search_parameters(name=name, max_gradients=6), 32, device)


def test_shards_that_are_searched_at_once_are_those_that_are_searched_alone(tmp_path):
    alone, joint = dataset_of(tmp_path / "alone"), dataset_of(tmp_path / "joint")
    assert list(alone.make(searching_on(CPU), alone.blocks)) == alone.blocks
    with PretendedGpu():
        search = searching_on(DEVICE)
        assert shards_at_once(search, joint.attack, joint.train) == 16
        assert list(joint.make(search, joint.blocks)) == joint.blocks
    assert len(joint.blocks) == 16
    for ours, theirs in zip(columns_in(joint), columns_in(alone), strict=True):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        same = (ours["status"] == theirs["status"]) & (ours["target"] == theirs["target"])
        assert same.mean() > 0.9
        np.testing.assert_allclose(ours["distance"][same], theirs["distance"][same], rtol=0.05)


def test_how_many_are_searched_at_once_follows_from_memory_and_search(tmp_path, monkeypatch):
    dataset = dataset_of(tmp_path)
    assert shards_at_once(searching_on(CPU), dataset.attack, dataset.train) == 1
    with PretendedGpu():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 64 * 32 * 4 * 5, 0))
        assert shards_at_once(searching_on(DEVICE), dataset.attack, dataset.train) == 5
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 0))
        assert shards_at_once(searching_on(DEVICE), dataset.attack, dataset.train) == 1
        for name in ("random", "view", "mixup", "cutmix"):
            assert shards_at_once(searching_on(DEVICE, name), dataset.attack, dataset.train) == 1


def test_passes_on_a_gpu_have_few_sizes(tmp_path):
    sizes = set()

    class Seen(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, images):
            sizes.add(len(images))
            return self.network(images)

    with PretendedGpu(), pytest.MonkeyPatch.context() as patch:
        for phase in ("walk", "close", "sidestep"):
            plain = getattr(pipeline.search.newton, phase)
            patch.setattr(
                pipeline.search.newton,
                phase,
                lambda rows, network, limits, plain=plain: plain(rows, Seen(network), limits),
            )
        search = dataclasses.replace(searching_on(DEVICE), batch_size=300)
        dataset = dataset_of(tmp_path, rows_per_shard=64)
        list(dataset.make(search, dataset.blocks))
    assert sizes <= {32, 256, 300}
    assert len(sizes) > 1


def test_a_shard_is_written_while_the_next_ones_are_searched(tmp_path, monkeypatch):
    """A disk that takes as long as the search: both together take little longer than one of them."""
    dataset, seconds, events = dataset_of(tmp_path), 0.1, []
    values = shard_values(searching_on(CPU), dataset.train, dataset.blocks[0], dataset.views, dataset.attack)
    keep = type(dataset).keep

    def search_slowly(*_):
        events.append("searched")
        time.sleep(seconds)
        return values

    def write_slowly(self, block, found):
        time.sleep(seconds)
        keep(self, block, found)
        events.append("written")

    monkeypatch.setattr(attack_dataset, "shard_values", search_slowly)
    monkeypatch.setattr(type(dataset), "keep", write_slowly)
    begin = time.perf_counter()
    for number, _ in enumerate(dataset.make(searching_on(CPU), dataset.blocks), start=1):
        assert events.count("written") >= number  # it is there to stay
        assert events.count("searched") <= number + 2  # a few wait in memory at most
    taken = time.perf_counter() - begin
    assert taken < 1.6 * seconds * len(dataset.blocks)
    assert not dataset.missing()


def test_a_shard_that_cannot_be_written_ends_the_attack_and_keeps_the_others(tmp_path, monkeypatch):
    dataset, keep = dataset_of(tmp_path), SampleDataset.keep

    def failing(self, block, values):
        if block == dataset.blocks[3]:
            raise StoreError("the disk is full")
        keep(self, block, values)

    monkeypatch.setattr(SampleDataset, "keep", failing)
    with pytest.raises(StoreError, match="the disk is full"):
        list(dataset.make(searching_on(CPU), dataset.blocks))
    assert dataset.blocks[3] in dataset.missing()
    assert not set(dataset.blocks[:3]) & set(dataset.missing())


# Training


class Watched:
    """A source, and what the device had to do from one batch to the next, this one's making included."""

    def __init__(self, inner, gpu):
        self.rows, self.inner, self.gpu, self.steps = inner.rows, inner, gpu, []

    def epoch(self, epoch):
        last = None
        for batch in self.inner.epoch(epoch):
            now = self.gpu.counts()
            if last is not None:
                self.steps.append(tuple(np.subtract(now, last).tolist()))
            last = now
            yield batch


def student_run(folder, store, method, device, targets=1, **training):
    changes = {"training.epochs": 2, "training.batch_size": 16, "runtime.device": device, "runtime.search_batch": 32}
    params = tiny_params(changes | {f"training.{name}": value for name, value in training.items()})
    splits = tiny_splits()
    shards = BoundaryShards(folder / f"targets-{targets}/shards")
    teacher = folder / f"targets-{targets}/teacher.safetensors"
    inputs = StudentInputs(splits["train"], splits["validation"], shards, teacher)
    return StudentRun.of(params, "resnet8w2", method, inputs, Processes(params.runtime, "32-true"), Store(store))


def state_of(fitted):
    return load_weights(fitted.weights).network.state_dict()


@cache
def trained(folder, method):
    """(Weights on the CPU, weights on the device, steps of the first epoch there)."""
    on_cpu = state_of(student_run(folder, folder / "cpu", method, "cpu").fit(0))
    watched = []
    with PretendedGpu() as gpu, pytest.MonkeyPatch.context() as patch:
        source = StudentRun._source

        def watch(run, seed):
            watched.append(Watched(source(run, seed), gpu))
            return watched[0]

        patch.setattr(StudentRun, "_source", watch)
        on_device = state_of(student_run(folder, folder / "gpu", method, "cuda").fit(0))
    return on_cpu, on_device, watched[0].steps


@pytest.mark.parametrize("half", [True, False])
def test_in_half_precision_weights_are_channels_last(gpu, half):
    network = move_to_(tiny_resnet(0), DEVICE, half).network
    assert network.conv1.weight.device == DEVICE
    assert network.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last) == half


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_as_on_the_cpu(folder, method):
    on_cpu, on_device, _ = trained(folder, method)
    for name, value in on_cpu.items():
        torch.testing.assert_close(on_device[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_asks_no_more_of_the_device(folder, method):
    steps = trained(folder, method)[2]
    assert len(steps) == 2 * 3  # between the four batches of each of two epochs
    if METHODS[method].source == "online" and METHODS[method].losses.keys() & {"bss"}:
        return  # searches, as above
    of_either_stage = np.max([steps[2], steps[5]], 0)
    assert_as_expected(f"step, {method}", of_either_stage.tolist())


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].source != "online"])
def test_the_host_does_not_wait_within_an_epoch(folder, method):
    assert {waits for _, waits in trained(folder, method)[2]} == {0}


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("targets", [1, 2])
def test_batches_of_shards_are_those_on_the_cpu(gpu, folder, resident, targets):
    shards = BoundaryShards(folder / f"targets-{targets}/shards")
    statuses = (Status.CONVERGED, Status.NOT_CONVERGED)
    compared = 0
    for epoch in range(2):
        batches = [
            ShardSource(shards, 7, 12, device, statuses, resident=resident).epoch(epoch) for device in (CPU, DEVICE)
        ]
        for ours, theirs in zip(*batches, strict=True):
            rows = torch.arange(len(ours.labels))
            samples = ours.boundary.samples_of(rows), theirs.boundary.samples_of(rows.to(DEVICE))
            for each in ("images", "labels", "teacher_logits", "usable"):
                assert getattr(theirs, each).device == DEVICE
                assert torch.equal(getattr(ours, each), getattr(theirs, each).cpu()), each
            for each in ("samples", "teacher_logits", "usable"):
                assert torch.equal(getattr(samples[0], each), getattr(samples[1], each).cpu()), each
            compared += len(rows)
    assert compared == 2 * shards.manifest.rows


def test_fresh_views_are_those_on_the_cpu_and_go_up_once_an_epoch(gpu):
    train, views = tiny_splits()["train"], view_parameters()
    sources = [FreshSource(train, views, 3, 12, device) for device in (CPU, DEVICE)]
    gpu.reset()
    batches = [list(source.epoch(1)) for source in sources]
    assert gpu.waits.total() == 3  # order, crops and flips
    assert len(batches[0]) == 6
    for ours, theirs in zip(*batches, strict=True):
        assert torch.equal(ours.images, theirs.images.cpu())
        assert torch.equal(ours.labels, theirs.labels.cpu())


@pytest.mark.parametrize("resumed_on", ["cuda", "cpu"])
def test_training_goes_on_from_a_checkpoint_of_the_device(folder, tmp_path, monkeypatch, resumed_on):
    monkeypatch.setattr(fit, "CHECKPOINT_SECONDS", 0)
    train_epoch = fit.TrainingRun.train_epoch

    def stopping(run, source, epoch, moment, seeds):
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(run, source, epoch, moment, seeds)

    def run_on(device, store):
        return student_run(folder, tmp_path / store, "bss", device, targets=2, epochs=4)

    with PretendedGpu():
        whole = state_of(run_on("cuda", "whole").fit(0))
        monkeypatch.setattr(fit.TrainingRun, "train_epoch", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_on("cuda", "stopped").fit(0)
    assert len(list((tmp_path / "stopped").rglob("checkpoint.pt"))) == 1
    epochs = []
    monkeypatch.setattr(
        fit.TrainingRun, "train_epoch", lambda run, *rest: epochs.append(rest[1]) or train_epoch(run, *rest)
    )
    if resumed_on == "cuda":
        with PretendedGpu():
            went_on = state_of(run_on("cuda", "stopped").fit(0))
    else:
        went_on = state_of(run_on("cpu", "stopped").fit(0))
    assert epochs == [2, 3]
    for name, value in whole.items():
        if resumed_on == "cuda":
            assert torch.equal(went_on[name], value), name
        torch.testing.assert_close(went_on[name], value, rtol=1e-3, atol=1e-4)


# Evaluation and networks


def test_an_evaluation_measures_what_it_measures_on_the_cpu():
    teacher, student = tiny_resnet(0), tiny_resnet(0)
    generator = torch.Generator().manual_seed(1)
    for weights in student.parameters():
        weights += 0.3 * weights.abs().mean() * torch.randn(weights.shape, generator=generator)
    split = random_prepared(0, 24, model=teacher)
    compared = [compare(student, teacher_side(teacher, split, CPU, 16), split, CPU, 16)]
    with PretendedGpu():
        compared.append(compare(student, teacher_side(teacher, split, DEVICE, 16), split, DEVICE, 16))
    ours, theirs = (comparison._asdict() for comparison in compared)
    assert 0.3 < compared[0].plane_agreement < 1
    assert np.isfinite(ours["magnitude"]).sum() > 5
    for name, value in ours.items():
        atol = 0.002 if name == "plane_agreement" else 1e-3  # of 10,000 points some lie on a boundary
        np.testing.assert_allclose(theirs[name], value, rtol=1e-3, atol=atol, err_msg=name)


@pytest.mark.filterwarnings("error")
def test_fast_networks_are_no_fallback_on_the_device(gpu):
    model = frozen(tiny_teacher(), DEVICE)
    plain = folded(model)
    half = halved(plain)
    assert not [module for module in plain.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32, torch.bfloat16}
    assert {each.device for each in (*half.parameters(), *half.buffers(), *plain.buffers())} == {DEVICE}


def test_a_byte_is_the_same_pixel_on_every_device(gpu):
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pixels(every.to(DEVICE)).cpu(), pixels(every))
    assert torch.equal(pixels(every), torch.from_numpy(np.arange(256, dtype=np.float32) / np.float32(255)))


def test_shards_bring_whole_numbers_from_the_device(gpu):
    train = tiny_splits()["train"]
    search = search_of(tiny_teacher(), search_parameters(name="mixup"), 32, DEVICE)
    brought = []
    download = PretendedGpu._download

    def noted(gpu, tensor):
        brought.append((tensor.dtype, tuple(tensor.shape[1:])))
        return download(gpu, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS_OF_DEVICE, "cpu", noted)
        shard_values(search, train, Block(1, 0, 0, 32), view_parameters(), attack_parameters())
    images = {dtype for dtype, shape in brought if shape == train.view_shape}
    assert images == {torch.uint8, torch.int8}
