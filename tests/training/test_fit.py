"""The fit loop: schedule, checkpoints, finished fits, and seeds side by side."""

import dataclasses
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load
from torch import nn

from pipeline.core.errors import DataError, ParameterError, TrainingError
from pipeline.networks.weights import load_weights, save_weights
from pipeline.student.run import sharing_shards
from pipeline.student.shard_source import ShardSource
from pipeline.training import fit as training
from pipeline.training.batches import BoundaryBatch, BoundarySamples, batches_of
from pipeline.training.fit import curve_csv, learning_rate, shorten_memory
from pipeline.training.objective import Moment
from tests.support.files import ROOT, flip_bit, on_full_disk, publish_samples, tiny_params, tiny_splits, truncate
from tests.support.fits import Recorded, StoppedError, fit_tiny, same_state, state_in, stop_at, student_run


def schedule(epochs, milestones, divisor=10, rate=0.1):
    parameters = tiny_params().training.model_copy(
        update={"epochs": epochs, "milestones": milestones, "divisor": divisor, "learning_rate": rate}
    )
    return [learning_rate(parameters, Moment(False, epoch, epochs)) for epoch in range(epochs)]


SCHEDULES = [
    (4, [], [0.1, 0.1, 0.1, 0.1]),
    (4, [0.5], [0.1, 0.1, 0.01, 0.01]),
    (4, [0.5, 0.75], [0.1, 0.1, 0.01, 0.001]),
    (5, [0.5], [0.1, 0.1, 0.1, 0.01, 0.01]),
    (3, [0.1, 0.2], [0.1, 0.001, 0.001]),
    (1, [0.5], [0.1]),
]


@pytest.mark.parametrize(("epochs", "milestones", "expected"), SCHEDULES)
def test_the_rate_is_divided_at_each_milestone(epochs, milestones, expected):
    assert schedule(epochs, milestones) == pytest.approx(expected)


MILESTONES = {"30 x 0.5": 15, "10 x 0.3": 3, "100 x 0.29": 29, "100 x 0.55": 55, "100 x 0.07": 7}


@pytest.mark.parametrize("case", MILESTONES)
def test_a_milestone_that_falls_on_an_epoch_counts_from_that_epoch(case):
    epochs, milestone, first = int(case.split(" x ")[0]), float(case.split(" x ")[1]), MILESTONES[case]
    rates = schedule(epochs, [milestone])
    assert rates[:first] == [0.1] * first
    assert rates[first:] == pytest.approx([0.01] * (epochs - first))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A fit that nothing happened to."""
    result = fit_tiny(tmp_path_factory.mktemp("undisturbed"), validation=True)
    return result.weights.read_bytes(), result.curve


@pytest.fixture
def every_epoch(monkeypatch):
    """A checkpoint after every epoch."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1)


def test_a_fit_learns_and_records_its_curve(undisturbed):
    _, curve = undisturbed
    assert [row["epoch"] for row in curve] == [1, 2, 3, 4, 5, 6]
    assert [row["learning_rate"] for row in curve] == pytest.approx([0.1] * 3 + [0.01] * 2 + [0.001])
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"]
    assert all(row.keys() == {"epoch", "learning_rate", "loss", "validation_accuracy"} for row in curve)


def test_the_curve_ends_with_the_accuracy_of_the_weights(undisturbed, tmp_path):
    weights, curve = undisturbed
    (tmp_path / "weights").write_bytes(weights)
    validation = tiny_splits()["validation"]
    logits = load_weights(tmp_path / "weights").eval()(torch.from_numpy(validation.images).float() / 255)
    correct = logits.argmax(1).numpy() == validation.labels
    assert curve[-1]["validation_accuracy"] == correct.mean()


def test_a_fit_without_a_validation_split_is_the_same_fit(tmp_path, undisturbed):
    result = fit_tiny(tmp_path)
    assert same_state(result.weights.read_bytes(), undisturbed[0])
    assert [row["loss"] for row in result.curve] == [row["loss"] for row in undisturbed[1]]
    assert all("validation_accuracy" not in row for row in result.curve)


def test_another_seed_is_another_fit(tmp_path, undisturbed):
    assert not same_state(fit_tiny(tmp_path, seed=1).weights.read_bytes(), undisturbed[0])


def refuse_to_make_a_source():
    pytest.fail("a finished fit needs no batches")


def test_a_finished_fit_is_reused(tmp_path):
    first = fit_tiny(tmp_path, validation=True)
    again = fit_tiny(tmp_path, refuse_to_make_a_source, validation=True)
    assert (first.reused, again.reused) == (False, True)
    assert again.weights == first.weights
    assert again.curve == first.curve
    assert sorted(path.name for path in (tmp_path / "key").iterdir()) == [
        "curve.json",
        "curve.json.sha256",
        "weights.safetensors",
        "weights.safetensors.sha256",
    ]


@pytest.mark.parametrize("name", ["weights.safetensors", "curve.json"])
def test_a_finished_fit_that_was_damaged_is_made_again(tmp_path, undisturbed, name):
    fit_tiny(tmp_path)
    flip_bit(tmp_path / "key" / name, 20)
    result = fit_tiny(tmp_path)
    assert not result.reused
    assert same_state(result.weights.read_bytes(), undisturbed[0])


def test_another_key_is_another_fit(tmp_path):
    fit_tiny(tmp_path)
    assert not fit_tiny(tmp_path, key="other").reused


DRIVER = """
import sys, time
from pathlib import Path

import torch

from pipeline.training import fit as training
from tests.support.fits import Recorded, fit_tiny

def before(epoch):
    if epoch == 3:
        print("three epochs done", flush=True)
        time.sleep(600)

training.CHECKPOINT_SECONDS = -1
torch.set_num_threads(1)
fit_tiny(Path(sys.argv[1]), Recorded(before), validation=True)
"""


def test_a_run_after_a_kill_goes_on_and_ends_as_if_nothing_had_happened(tmp_path, undisturbed):
    (tmp_path / "driver.py").write_text(DRIVER)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "driver.py", tmp_path / "store"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == "three epochs done\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path.name for path in (tmp_path / "store/key").iterdir()] == ["checkpoint.pt"]
    source = Recorded()
    result = fit_tiny(tmp_path / "store", source, validation=True)
    assert source.epochs == [3, 4, 5]
    assert not result.reused
    assert same_state(result.weights.read_bytes(), undisturbed[0])
    assert result.curve == undisturbed[1]


def stopped_fit(store):
    """A fit that was stopped in its fourth epoch; returns its checkpoint."""
    with pytest.raises(StoppedError):
        fit_tiny(store, Recorded(stop_at(3)), validation=True)
    return store / "key/checkpoint.pt"


def resumed_epochs(store, undisturbed):
    """Which epochs a second run trains; its result must be that of a run that nothing happened to."""
    source = Recorded()
    result = fit_tiny(store, source, validation=True)
    assert same_state(result.weights.read_bytes(), undisturbed[0])
    assert result.curve == undisturbed[1]
    return source.epochs


def test_a_stopped_run_resumes(tmp_path, undisturbed, every_epoch):
    stopped_fit(tmp_path)
    assert resumed_epochs(tmp_path, undisturbed) == [3, 4, 5]


def test_the_test_split_in_the_curve_changes_nothing_else_and_outlives_a_stop(tmp_path, undisturbed, every_epoch):
    with pytest.raises(StoppedError):
        fit_tiny(tmp_path, Recorded(stop_at(3)), validation=True, test=True)
    result = fit_tiny(tmp_path, validation=True, test=True)
    assert same_state(result.weights.read_bytes(), undisturbed[0])
    found = [row.pop("test_accuracy") for row in result.curve]
    assert result.curve == undisturbed[1]
    test, model = tiny_splits()["test"], load_weights(result.weights).eval()
    with torch.no_grad():
        classes = model(torch.from_numpy(test.images).float() / 255).argmax(1).numpy()
    assert found[-1] == (classes == test.labels).mean()
    assert len(set(found)) > 1


@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b"")], ids=["truncated", "empty"])
def test_a_damaged_checkpoint_starts_over(tmp_path, undisturbed, every_epoch, damage):
    damage(stopped_fit(tmp_path))
    assert resumed_epochs(tmp_path, undisturbed) == [0, 1, 2, 3, 4, 5]


def test_a_checkpoint_with_a_flipped_bit_starts_over(tmp_path, undisturbed, every_epoch):
    checkpoint = stopped_fit(tmp_path)
    weight = state_in(checkpoint)["model"]["network.linear.weight"]
    flip_bit(checkpoint, checkpoint.read_bytes().index(weight.numpy().tobytes()) + 3)  # an exponent's bit
    assert resumed_epochs(tmp_path, undisturbed) == [0, 1, 2, 3, 4, 5]


def test_without_a_checkpoint_in_time_a_stopped_run_starts_over(tmp_path, undisturbed):
    with pytest.raises(StoppedError):
        fit_tiny(tmp_path, Recorded(stop_at(3)))
    assert not (tmp_path / "key/checkpoint.pt").exists()
    assert resumed_epochs(tmp_path, undisturbed) == [0, 1, 2, 3, 4, 5]


def test_a_full_disk_stops_training_with_a_clear_error(tmp_path, every_epoch):
    outcome = on_full_disk(lambda: fit_tiny(tmp_path), limit=5000)
    assert type(outcome).__name__ == "StoreError", repr(outcome)
    assert str(tmp_path / "key/checkpoint.pt") in str(outcome)


def with_nan(batch, epoch, step):
    return dataclasses.replace(batch, images=batch.images * torch.nan) if (epoch, step) == (2, 1) else batch


def test_a_loss_that_is_not_finite_stops_with_epoch_and_step_and_keeps_the_last_checkpoint(tmp_path, every_epoch):
    with pytest.raises(TrainingError) as caught:
        fit_tiny(tmp_path, Recorded(change=with_nan))
    assert re.search(r"the loss is nan in epoch 3, step 2: try a lower learning rate", str(caught.value))
    checkpoint = tmp_path / "key/checkpoint.pt"
    assert str(checkpoint) in str(caught.value)
    state = state_in(checkpoint)
    assert [len(curve) for curve in state["curves"]] == [2]
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    assert [path.name for path in (tmp_path / "key").iterdir()] == ["checkpoint.pt"]


def test_a_learning_rate_that_is_far_too_high_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) in epoch \d+, step \d+"):
        fit_tiny(tmp_path, learning_rate=1e30)
    assert not list(tmp_path.rglob("weights.safetensors*"))


def test_curves_are_csv_with_whole_epochs():
    curves = [
        ({"seed": 0}, [{"epoch": 1.0, "loss": 0.5}, {"epoch": 2.0, "loss": 0.25}]),
        ({"seed": 1}, [{"epoch": 1.0, "loss": 1.0}]),
    ]
    assert curve_csv(curves) == "seed,epoch,loss\n0,1,0.5\n0,2,0.25\n1,1,1.0\n"
    assert curve_csv([({}, [])]) == "epoch,learning_rate,loss,validation_accuracy\n"


@pytest.fixture(scope="module")
def sample_directory(tmp_path_factory):
    return publish_samples(tmp_path_factory.mktemp("samples"))


@pytest.mark.parametrize("method", ["original", "bss"])
def test_seeds_side_by_side_end_as_seeds_one_after_the_other(tmp_path, sample_directory, method):
    beside = {"seeds": 3, "runtime.workers": 2, "runtime.threads": 2}
    fits = student_run(tmp_path / "beside", sample_directory, method, beside).fit_all()
    torch.set_num_threads(1)
    alone = {"seeds": 3, "runtime.workers": 1, "runtime.threads": 1}
    after = student_run(tmp_path / "alone", sample_directory, method, alone).fit_all()
    assert [result.reused for result in fits] == [False] * 3
    for result, single in zip(fits, after, strict=True):
        assert same_state(result.weights.read_bytes(), single.weights.read_bytes())
        assert result.curve == single.curve
    assert len({result.curve[-1]["loss"] for result in fits}) == 3


def test_finished_seeds_are_found_whatever_the_number_of_workers(tmp_path, sample_directory):
    two = {"runtime.workers": 2, "runtime.threads": 2}
    student_run(tmp_path, sample_directory, "original", {"seeds": 4}).fit_all()  # a whole stack
    fits = student_run(tmp_path, sample_directory, "original", {"seeds": 5} | two).fit_all()
    assert [result.reused for result in fits] == [True] * 4 + [False]


def test_an_error_in_one_of_several_workers_is_the_runs_error(tmp_path, sample_directory):
    changes = {"seeds": 2, "runtime.workers": 2, "runtime.threads": 2, "training.learning_rate": 1e30}
    with pytest.raises(TrainingError, match=r"the loss of seed \d is (nan|inf) in epoch \d+, step \d+"):
        student_run(tmp_path, sample_directory, "original", changes).fit_all()


KEYS = {
    "original": (
        {"views.padding": 2, "training.epochs": 3},
        {"search.tolerance": 0.1, "method.hinton.hinton.temperature": 4},
    ),
    "hinton": (
        {"method.hinton.hinton.temperature": 4},
        {"method.bss.hinton.temperature": 4, "method.bss.bss.start": 1, "views.padding": 2},
    ),
    "bss": (
        {"method.bss.bss.start": 1, "method.bss.bss.converged_only": False},
        {"runtime.search_batch": 8, "attack.views": 9, "method.bss_online.bss.start": 1},
    ),
    "bss_online": (
        {"search.tolerance": 0.1, "search.name": "deepfool"},
        {"attack.views": 9, "attack.rows_per_shard": 7},
    ),
    "hinton_online": ({"views.padding": 2}, {"search.tolerance": 0.1, "search.name": "deepfool"}),
    "at": ({"method.at.at.weight": 2}, {"search.tolerance": 0.1, "method.fsp.fsp.weight": 2}),
    "kd": ({"method.kd.kd.standardised": True}, {"method.kd.kd.standardised": False}),
    "dkd": ({"method.dkd.dkd.target": 2}, {"search.tolerance": 0.1, "method.dkd_bss.dkd.target": 2}),
}


@pytest.mark.parametrize("method", KEYS)
def test_a_fits_fingerprint_holds_what_its_method_reads_and_nothing_else(tmp_path, sample_directory, method):
    read, ignored = KEYS[method]
    before = student_run(tmp_path, sample_directory, method).reads
    for key, value in read.items():
        assert student_run(tmp_path, sample_directory, method, {key: value}).reads != before, key
    for key, value in ignored.items():
        assert student_run(tmp_path, sample_directory, method, {key: value}).reads == before, key


@pytest.mark.parametrize(
    ("method", "missing", "expected"),
    [
        ("original", "train", "needs prepared training data"),
        ("bss", "shards", "needs a sample dataset"),
        ("bss_online", "teacher", "needs a teacher"),
        ("at", "teacher", "needs a teacher"),
        ("rkd_bss", "shards", "needs a sample dataset"),
    ],
)
def test_a_missing_input_is_named(tmp_path, sample_directory, method, missing, expected):
    with pytest.raises(DataError, match=f"resnet8w2-{method}: {expected}"):
        student_run(tmp_path, sample_directory, method, **{missing: None})


# Four epochs: methods with a first stage have one of it and three of the second.
FEW_EPOCHS = {"seeds": 1, "training.epochs": 4, "training.learning_rate": 0.02}
LOGITS = ("dkd", "dkd_bss", "dkd_standardised", "kd_standardised", "dist", "bss_alone")
WARMING_UP = ("dkd", "dkd_bss", "dkd_standardised")
FEATURES = ("fitnet", "fitnet_one_stage", "at", "fsp", "rkd", "crd", "rkd_bss")


@pytest.mark.parametrize("method", [*FEATURES, *LOGITS])
def test_every_method_trains_from_shards(tmp_path, sample_directory, method):
    run = student_run(tmp_path, sample_directory, method, FEW_EPOCHS)
    (result,) = run.fit_all()
    assert not result.reused
    curve = [row["loss"] for row in result.curve]
    assert len(curve) == 4
    # The first epoch is another loss: a stage of its own, or before what warms up.
    assert curve[-1] < curve[1 if method in ("fitnet", "fsp", *WARMING_UP) else 0]
    plain = student_run(tmp_path, sample_directory, "original", FEW_EPOCHS).fit(0)
    state, expected = load(result.weights.read_bytes()), load(plain.weights.read_bytes())
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    # Finished, it is found without a teacher's pass, and trained again it ends as it did.
    assert student_run(tmp_path, sample_directory, method, FEW_EPOCHS).fit(0).reused
    (again,) = student_run(tmp_path / "again", sample_directory, method, FEW_EPOCHS).fit_all()
    assert same_state(again.weights.read_bytes(), result.weights.read_bytes())


def test_methods_end_with_weights_of_their_own(tmp_path, sample_directory):
    methods = ("hinton", "bss", *FEATURES, *LOGITS)
    ends = [
        student_run(tmp_path, sample_directory, method, FEW_EPOCHS).fit(0).weights.read_bytes() for method in methods
    ]
    for number, one in enumerate(ends):
        assert not any(same_state(one, other) for other in ends[:number]), methods[number]


@pytest.mark.parametrize("method", FEATURES)
def test_a_method_that_reads_features_refuses_another_teacher(tmp_path, sample_directory, method):
    other = tmp_path / "other.safetensors"
    teacher = load_weights(sample_directory / "teacher.safetensors")
    with torch.no_grad():
        teacher.network.conv1.weight[0, 0, 0, 0] += 1
    save_weights(teacher, other)
    with pytest.raises(DataError) as caught:
        student_run(tmp_path, sample_directory, method, teacher=other)
    message = str(caught.value)
    assert message.startswith(
        f"{other}: not the teacher of the samples in {sample_directory / 'bss'}, and resnet8w2-{method}"
    )
    assert "take the teacher that they were made with, or make samples of this one" in message
    assert "\n" not in message


@pytest.mark.parametrize("method", FEATURES)
def test_a_method_that_reads_features_refuses_a_missing_teacher(tmp_path, sample_directory, method):
    with pytest.raises(DataError) as caught:
        student_run(tmp_path, sample_directory, method, teacher=tmp_path / "none.safetensors")
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path / 'none.safetensors'}: no such file, and resnet8w2-{method} reads the teacher's"
    )
    assert "or take a method that reads logits alone, as hinton, dkd or bss" in message
    assert "\n" not in message


@pytest.mark.parametrize("method", [*LOGITS, "hinton", "bss"])
def test_a_method_that_reads_logits_alone_wants_no_teacher(tmp_path, sample_directory, method):
    run = student_run(tmp_path / "none", sample_directory, method, FEW_EPOCHS, teacher=tmp_path / "none.safetensors")
    without = run.fit(0)
    given = sample_directory / "teacher.safetensors"
    with_it = student_run(tmp_path / "given", sample_directory, method, FEW_EPOCHS, teacher=given).fit(0)
    assert same_state(without.weights.read_bytes(), with_it.weights.read_bytes())


BAD_LAYERS = {
    "unknown": ({"method.at.at.student_layers": ["layer1", "layer2", "layer4"]}, "has no layer 'layer4', expected one"),
    "sizes": ({"method.at.at.student_layers": ["layer1", "layer2", "layer2"]}, "cannot be matched"),
}


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_layers_that_do_not_fit_are_refused_before_any_training(tmp_path, sample_directory, case):
    changes, expected = BAD_LAYERS[case]
    with pytest.raises(ParameterError, match=expected):
        student_run(tmp_path, sample_directory, "at", changes)


def numbered_batch(rows):
    images = torch.arange(rows * 4.0).view(rows, 1, 2, 2)
    labels = torch.arange(rows)

    class Boundary:
        def samples_of(self, chosen):
            return BoundarySamples(samples=images[chosen], teacher_logits=chosen[:, None], usable=chosen % 2 == 0)

    return BoundaryBatch(
        images=images,
        labels=labels,
        teacher_logits=images.flatten(1),
        usable=labels % 2 == 0,
        boundary=Boundary(),
    )


@pytest.mark.parametrize(("rows", "parts"), [(8, 2), (7, 2), (7, 3), (1, 3), (5, 1)])
def test_parts_of_a_batch_are_the_whole_and_their_mean_is_its_mean(rows, parts):
    whole = numbered_batch(rows)
    split = [whole.part(number, parts) for number in range(parts)]
    real = [(part, factor) for part, factor in split if factor]
    assert sorted(int(label) for part, _ in real for label in part.labels) == list(range(rows))
    mean = sum(factor * part.images.double().mean() for part, factor in split) / parts
    torch.testing.assert_close(mean, whole.images.double().mean())
    for part, _ in split:
        assert torch.equal(part.images, whole.images[part.labels])
        assert torch.equal(part.teacher_logits, whole.teacher_logits[part.labels])
        assert torch.equal(part.usable, whole.usable[part.labels])
        chosen = torch.tensor([len(part.labels) - 1])
        found = part.boundary.samples_of(chosen)
        assert torch.equal(found.samples, part.images[chosen])
        assert torch.equal(found.teacher_logits[:, 0], part.labels[chosen])
        assert torch.equal(found.usable, part.usable[chosen])


@pytest.mark.parametrize(
    ("rows", "size", "sizes"),
    [(8, 4, [4, 4]), (9, 4, [4, 5]), (10, 4, [4, 4, 2]), (1, 4, [1]), (5, 4, [5]), (3, 1, [1, 1, 1]), (0, 4, [])],
)
def test_no_batch_is_a_single_row_that_is_left_over(rows, size, sizes):
    batches = list(batches_of(rows, size))
    assert [batch.stop - batch.start for batch in batches] == sizes
    assert [row for batch in batches for row in range(batch.start, batch.stop)] == list(range(rows))


def test_runs_that_share_shards_load_them_once_and_end_as_those_that_do_not(tmp_path, sample_directory, monkeypatch):
    few, loads, load_all = {"seeds": 1, "training.epochs": 2, "runtime.workers": 1}, [], ShardSource._load_all
    monkeypatch.setattr(ShardSource, "_load_all", lambda source: loads.append(source.columns) or load_all(source))
    methods = ("hinton", "original", "kd_bss", "dkd")
    shared = sharing_shards([student_run(tmp_path / "shared", sample_directory, method, few) for method in methods])
    together = [run.fit_all()[0].weights.read_bytes() for run in shared]
    assert len(loads) == 1
    assert "delta" in loads[0]  # which kd_bss needs
    for method, weights in zip(methods, together, strict=True):
        (alone,) = student_run(tmp_path / "alone", sample_directory, method, few).fit_all()
        assert same_state(alone.weights.read_bytes(), weights)
    assert len(loads) == 1 + 3
    assert ["delta" in columns for columns in loads[1:]] == [False, True, False]


@pytest.mark.parametrize(
    ("momentum", "steps", "expected"),
    [(0.1, 10, 0.1), (0.1, 10_000, 0.1), (0.01, 480, 30 / 480), (0.01, 100, 0.1), (0.01, 10_000, 0.01), (0.5, 9, 0.5)],
)
def test_batch_norm_remembers_a_thirtieth_of_the_training_at_most(momentum, steps, expected):
    layer, without = nn.BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=None)
    shorten_memory(nn.Sequential(layer, without), steps)
    assert layer.momentum == pytest.approx(expected)
    assert without.momentum is None


def test_a_network_with_a_long_memory_knows_in_evaluation_what_it_learned():
    """Statistics that lag behind leave a network at chance that tells the training images apart."""
    train = tiny_splits()["train"]

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, momentum=0.001), nn.ReLU(), nn.Flatten())
            self.linear = nn.Linear(288, 4)

        def forward(self, images):
            return self.linear(self.net(images * 30 + 50))

    torch.manual_seed(0)
    accuracies_of = []
    for steps in (1_000_000, 60):
        torch.manual_seed(0)
        network = Slow()
        shorten_memory(network, steps)
        optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
        images, labels = torch.from_numpy(train.images) / 255, torch.from_numpy(train.labels)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
        with torch.no_grad():
            accuracies_of.append(float((network.eval()(images).argmax(1) == labels).float().mean()))
    assert accuracies_of[0] < 0.6
    assert accuracies_of[1] > 0.95
