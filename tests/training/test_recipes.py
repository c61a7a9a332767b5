"""Optimisers, schedules and what else a recipe has: against torch's own, and exact on resume."""

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch.nn import functional as F

from pipeline.core.errors import ParameterError
from pipeline.networks.predict import accuracy
from pipeline.networks.weights import load_weights
from pipeline.training import fit as training
from pipeline.training.batches import Batch
from pipeline.training.fit import learning_rate
from pipeline.training.objective import Moment, Objective
from tests.support.files import tiny_params, tiny_splits
from tests.support.fits import Recorded, StoppedError, fit_tiny, same_state, stop_at
from tests.support.helpers import CPU, tiny_resnet

EVERYTHING = {
    "optimizer": "adamw",
    "learning_rate": 0.01,
    "schedule": "cosine",
    "warm_up": 0.3,
    "clip_norm": 0.5,
    "averaged": 0.5,
}


def rates(epochs, **changes):
    given = tiny_params({"training.epochs": epochs, **{f"training.{name}": value for name, value in changes.items()}})
    return [learning_rate(given.training, Moment(False, epoch, epochs)) for epoch in range(epochs)]


def torch_rates(epochs, make):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    scheduler, found = make(optimizer), []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def cosine(epochs):
    return torch_rates(epochs, lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs))


def test_a_cosine_is_torchs():
    assert rates(30, schedule="cosine", learning_rate=0.1) == pytest.approx(cosine(30))


def test_a_rate_warms_up_linearly_and_then_follows_its_schedule():
    ours = rates(25, schedule="cosine", warm_up=0.2, learning_rate=0.1)
    assert ours[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert ours[5:] == pytest.approx(cosine(20))
    ours = rates(25, warm_up=0.2, learning_rate=0.1, milestones=[0.52, 0.8], divisor=10)
    assert ours[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    steps = torch_rates(25, lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [13, 20], 0.1))
    assert ours[5:] == pytest.approx(steps[5:])


@pytest.mark.parametrize(
    ("changes", "make"),
    [
        ({}, lambda p: torch.optim.SGD(p, 0.001, 0.9, weight_decay=1e-4)),
        ({"nesterov": True}, lambda p: torch.optim.SGD(p, 0.001, 0.9, weight_decay=1e-4, nesterov=True)),
        ({"optimizer": "adamw"}, lambda p: torch.optim.AdamW(p, 0.001, weight_decay=1e-4)),
    ],
)
def test_an_optimiser_is_torchs(changes, make):
    given = tiny_params({f"training.{key}": value for key, value in changes.items()}).training
    given = given.model_copy(update={"learning_rate": 0.001, "momentum": 0.9, "weight_decay": 1e-4})
    ends = []
    for made in (lambda parameters: training._optimizer(parameters, given), make):
        network = tiny_resnet(0).double().requires_grad_()
        optimizer = made(list(network.parameters()))
        for seed in range(5):
            images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            optimizer.zero_grad()
            network(images).square().sum().backward()
            optimizer.step()
        ends.append(torch.cat([value.flatten() for value in network.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)


def test_smoothed_labels_are_mixed_with_all_classes():
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    wanted = 0.7 * np.eye(4)[labels] + 0.3 / 4
    expected = -(wanted * F.log_softmax(logits, 1).numpy()).sum(1).mean()
    objective = Objective(tiny_resnet(0), smoothing=0.3)
    batch = Batch(images=torch.rand(6, 1, 8, 8), labels=labels)
    assert float(objective.loss(lambda _: logits, batch, Moment(False, 0, 1))) == pytest.approx(expected)
    stack = Batch(images=torch.rand(2, 6, 1, 8, 8), labels=labels.expand(2, 6))
    both = objective.loss(lambda _: torch.stack([logits, logits.flip(0)]), stack, Moment(False, 0, 1))
    assert both.shape == (2,)
    assert float(both[0]) == pytest.approx(expected)


def test_averaged_weights_are_the_mean_of_the_last_epochs(tmp_path):
    """At a constant rate a longer run passes through the ends of shorter ones."""
    ends = [
        load(fit_tiny(tmp_path / str(epochs), epochs=epochs, milestones=[]).weights.read_bytes())
        for epochs in (4, 5, 6)
    ]
    averaged = load(fit_tiny(tmp_path / "mean", epochs=6, averaged=0.5, milestones=[]).weights.read_bytes())
    for name, value in averaged.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, torch.stack([end[name] for end in ends]).mean(0), rtol=1e-4, atol=1e-5)


def test_the_curve_is_of_the_averaged_network(tmp_path):
    run = fit_tiny(tmp_path, epochs=4, averaged=0.5, validation=True)
    found = accuracy(load_weights(run.weights), tiny_splits()["validation"], CPU)
    assert run.curve[-1]["validation_accuracy"] == found


def test_gradients_are_clipped_to_a_norm(tmp_path, monkeypatch):
    norms, clip = [], training.clip_grad_norm_

    def noted(parameters, largest):
        clip(parameters, largest)
        norms.append(float(torch.cat([each.grad.flatten() for each in parameters]).norm()))

    monkeypatch.setattr(training, "clip_grad_norm_", noted)
    fit_tiny(tmp_path, epochs=2, clip_norm=0.05)
    assert len(norms) == 2 * 4
    assert max(norms) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("stopped_at", [1, 4, 5])
def test_a_run_with_everything_goes_on_exactly(tmp_path, monkeypatch, stopped_at):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    whole = fit_tiny(tmp_path / "whole", epochs=6, validation=True, **EVERYTHING)
    with pytest.raises(StoppedError):
        fit_tiny(tmp_path / "stopped", Recorded(before=stop_at(stopped_at)), epochs=6, validation=True, **EVERYTHING)
    again = Recorded()
    result = fit_tiny(tmp_path / "stopped", again, epochs=6, validation=True, **EVERYTHING)
    assert again.epochs == list(range(stopped_at, 6))
    assert same_state(result.weights.read_bytes(), whole.weights.read_bytes())
    assert result.curve == whole.curve


def test_momentum_that_looks_ahead_needs_momentum():
    for changes in ({"training.momentum": 0.0}, {"training.optimizer": "adamw"}):
        with pytest.raises(ParameterError, match="'nesterov' is of optimizer 'sgd' with a momentum above 0"):
            tiny_params({"training.nesterov": True} | changes)
