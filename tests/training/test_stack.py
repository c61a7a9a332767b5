"""Students trained as one: as each of them alone, with its own order, views and first weights."""

import dataclasses
import random

import pytest
import torch

from pipeline.core.errors import TrainingError
from pipeline.networks.classifier import architecture_for, build
from pipeline.networks.stack import MEMBERS, Stack
from pipeline.shards.reader import BoundaryShards
from pipeline.student import shard_source
from pipeline.student.shard_source import ShardSource, StackedShardSource
from pipeline.training import fit as training
from pipeline.training.batches import BoundaryBatch, FreshSource, StackedFreshSource, TeacherBatch
from pipeline.training.objective import Moment, Objective
from pipeline.training.term import statuses_of
from tests.support.files import publish_samples, tiny_params, tiny_splits, tiny_teacher
from tests.support.fits import StoppedError, same_state, student_run
from tests.support.helpers import CPU, attack_parameters, make_shards, view_parameters

SEEDS = range(MEMBERS)
METHODS = ("original", "hinton", "kd", "kd_standardised", "bss", "kd_bss", "dkd", "dkd_standardised", "dist", "dkd_bss")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Samples with two target classes, of which a seed chooses."""
    folder = tmp_path_factory.mktemp("stack")
    attack = attack_parameters(targets=2, rows_per_shard=8)
    return BoundaryShards(make_shards(folder, tiny_splits()["train"], tiny_teacher(), attack))


def sources(method, shards, batch_size):
    """The batches of all seeds at once, and of each."""
    if method.source == "fresh":
        each = [FreshSource(tiny_splits()["train"], view_parameters(), seed, batch_size, CPU) for seed in SEEDS]
        return StackedFreshSource(each[0], SEEDS), each
    loaded = ShardSource(shards, 0, batch_size, CPU, statuses_of(method.losses))
    return StackedShardSource(loaded, SEEDS), [loaded.for_fit(seed, loaded.statuses) for seed in SEEDS]


class InDouble:
    """The samples of a batch, float64."""

    def __init__(self, rows):
        self.rows = rows

    def samples_of(self, rows):
        return dataclasses.replace(self.rows.samples_of(rows), samples=self.rows.samples_of(rows).samples.double())


def in_double(batch):
    batch = dataclasses.replace(batch, images=batch.images.double())
    if isinstance(batch, TeacherBatch):
        batch = dataclasses.replace(batch, teacher_logits=batch.teacher_logits.double())
    return dataclasses.replace(batch, boundary=InDouble(batch.boundary)) if isinstance(batch, BoundaryBatch) else batch


def after_steps(classifier, method, source, steps=20):
    """The losses of so many steps in float64, in which all terms have their weight."""
    objective = Objective(classifier.double().train(), method.losses, None, method.cross_entropy)
    optimizer = torch.optim.SGD(classifier.parameters(), 0.05, 0.9, weight_decay=1e-3)
    losses = []
    while len(losses) < steps:
        for batch in source.epoch(len(losses)):
            loss = objective.loss(classifier, in_double(batch), Moment(False, 1, 4))
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("network", ["resnet8w2", "mlp2w8"])
def test_a_stack_trains_as_its_members_alone(shards, name, network):
    tame = {"method.dist.dist.temperature": 1}  # at 4, T^2 makes this rate diverge, and rounding grows with it
    method, kind = tiny_params(tame).method[name], architecture_for(network, tiny_splits()["train"])
    first = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        first.append(build(kind).double())
    stack = Stack(first).double()
    together, alone = sources(method, shards, batch_size=9)
    losses = after_steps(stack, method, together)
    assert losses.shape[1] == MEMBERS
    for number, (network, source) in enumerate(zip(first, alone, strict=True)):
        expected = after_steps(network, method, source)
        torch.testing.assert_close(losses[:, number], expected, rtol=0, atol=1e-9)
        state = network.network.state_dict()
        for key, value in stack.states()[number].items():
            torch.testing.assert_close(value, state[key], rtol=0, atol=1e-9)
    assert len(set(losses[-1].tolist())) == MEMBERS  # of seeds of their own


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return publish_samples(tmp_path_factory.mktemp("samples"))


@pytest.mark.parametrize("method", ["original", "kd_bss"])
def test_fits_of_a_stack_are_those_of_single_students_within_rounding(tmp_path, samples, method):
    few = {"seeds": 3, "training.epochs": 3}
    stacked = student_run(tmp_path / "stacked", samples, method, few).fit_all()
    single = student_run(tmp_path / "single", samples, method, few)
    for seed, result in enumerate(stacked):
        alone = single.fit(seed)
        assert len(alone.curve) == len(result.curve) == 3
        for row, other in zip(result.curve, alone.curve, strict=True):
            assert row == pytest.approx(other, abs=0.05)  # a tiny network's validation images are few
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_a_stack_that_was_interrupted_goes_on_from_its_checkpoint(tmp_path, samples, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    few = {"seeds": 2, "training.epochs": 5, "runtime.workers": 1}
    test = tiny_splits()["test"]
    whole = student_run(tmp_path / "whole", samples, "bss", few, test=test).fit_all()
    run, epochs = student_run(tmp_path / "stopped", samples, "bss", few, test=test), []
    plain = training.TrainingRun.train_epoch

    def stopping(self, source, epoch, moment, seeds):
        epochs.append(epoch)
        if len(epochs) == 4:
            raise StoppedError
        return plain(self, source, epoch, moment, seeds)

    monkeypatch.setattr(training.TrainingRun, "train_epoch", stopping)
    with pytest.raises(TrainingError, match="resnet8w2-bss seeds 0 to 3: StoppedError"):
        run.fit_all()
    again = student_run(tmp_path / "stopped", samples, "bss", few, test=test).fit_all()
    assert epochs == [0, 1, 2, 3, 3, 4]
    for result, expected in zip(again, whole, strict=True):
        assert same_state(result.weights.read_bytes(), expected.weights.read_bytes())
        assert result.curve == expected.curve
        assert all("test_accuracy" in row for row in result.curve)
    assert not list(tmp_path.glob("stopped/*/*.pt"))


def test_seeds_keep_their_companions(tmp_path, samples):
    run = student_run(tmp_path, samples, "bss", {"seeds": 6})
    assert run.groups([5]) == [[4, 5, 6, 7]]
    assert run.groups([0, 1, 2, 3, 4, 5]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert student_run(tmp_path, samples, "at", {"seeds": 6}).groups([2, 3]) == [[2], [3]]  # its loss reads features
    assert student_run(tmp_path, samples, "bss_online", {"seeds": 6}).groups([2, 3]) == [[2], [3]]


def test_members_that_nobody_asked_for_are_there_later(tmp_path, samples):
    student_run(tmp_path, samples, "original", {"seeds": 1}).fit_all()
    fits = student_run(tmp_path, samples, "original", {"seeds": 5}).fit_all()
    assert [fit.reused for fit in fits] == [True] * 4 + [False]


def test_a_member_that_is_finished_stays_as_it_is(tmp_path, samples):
    run = student_run(tmp_path, samples, "original", {"seeds": 2})
    before = run.fit(0)
    content = before.weights.read_bytes()
    run.fit_all()
    assert run.fit(0).weights.read_bytes() == content


def test_shards_that_do_not_fit_into_memory_are_trained_from_one_by_one(tmp_path, samples, monkeypatch):
    monkeypatch.setattr(shard_source, "free_memory", lambda device: 0)
    few = {"seeds": 2, "training.epochs": 1, "runtime.workers": 1}
    streamed = student_run(tmp_path / "streamed", samples, "bss", few).fit_all()
    assert [fit.reused for fit in streamed] == [False, False]
    alone = student_run(tmp_path / "alone", samples, "bss", few)
    assert all(
        same_state(fit.weights.read_bytes(), alone.fit(n).weights.read_bytes()) for n, fit in enumerate(streamed)
    )


def test_a_loss_that_is_not_finite_names_the_seed(tmp_path, samples):
    seed = random.Random(0).randrange(MEMBERS)
    run = student_run(tmp_path, samples, "original", {"seeds": MEMBERS, "training.epochs": 2})
    plain = StackedFreshSource.epoch

    def with_nan(self, epoch):
        for step, batch in enumerate(plain(self, epoch)):
            if step == 1:
                batch.images[seed, 0] = torch.nan
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StackedFreshSource, "epoch", with_nan)
        with pytest.raises(TrainingError, match=f"the loss of seed {seed} is nan in epoch 1, step 2"):
            run.fit_group(list(SEEDS), None)
