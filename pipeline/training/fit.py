"""One fit loop for teacher and students, with checkpoints, and finished fits kept by fingerprint."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from pipeline.core.errors import ParameterError, TrainingError
from pipeline.core.files import write_atomically, write_json
from pipeline.core.parameters import Training
from pipeline.core.store import Store
from pipeline.core.text import csv_text
from pipeline.images.prepared import Prepared
from pipeline.machine.processes import Processes
from pipeline.networks.classifier import Architecture, Classifier, build, move_to_
from pipeline.networks.predict import accuracies
from pipeline.networks.stack import Stack, members_of
from pipeline.networks.weights import save_weights
from pipeline.training.batches import Source
from pipeline.training.objective import Moment, Objective

if TYPE_CHECKING:
    from lightning_fabric import Fabric

CHECKPOINT_SECONDS = 5.0
LAYERS_NAMED = 30  # in messages
USUAL_MOMENTUM, MEMORIES = 0.1, 30  # of batch norm; how often a training goes through what it remembers
DIGEST_BYTES = sha256().digest_size  # before the content of a checkpoint
WEIGHTS, CURVE = "weights.safetensors", "curve.json"
CHECKPOINT, STACK_CHECKPOINT = "checkpoint.pt", "stack.pt"  # the latter is kept under the key of the first member
CURVE_COLUMNS = ["epoch", "learning_rate", "loss", "validation_accuracy"]


class Fit(NamedTuple):
    """A finished training run."""

    weights: Path
    """Safetensors file in the store."""
    curve: list[dict[str, float]]
    """One row an epoch: epoch, learning_rate, loss; validation_accuracy and test_accuracy of splits that are given."""
    reused: bool
    """It was finished before."""


def learning_rate(training: Training, moment: Moment) -> float:
    """Return the learning rate of an epoch of a stage.

    It rises linearly while it warms up (Goyal et al., 2017). Then it follows half a cosine (Loshchilov & Hutter, 2017),
    or is divided at each milestone that is passed.
    """
    rising = math.ceil(round(training.warm_up * moment.epochs, 6))
    if moment.epoch < rising:
        return training.learning_rate * (moment.epoch + 1) / rising
    if training.schedule == "cosine":
        fallen = (moment.epoch - rising) / (moment.epochs - rising)
        return training.learning_rate * (1 + math.cos(math.pi * fallen)) / 2
    passed = sum(moment.epoch >= round(milestone * moment.epochs, 6) for milestone in training.milestones)
    return training.learning_rate / training.divisor**passed


@dataclass(frozen=True, slots=True, kw_only=True)
class FitTask:
    """One training run."""

    key: str
    """Fingerprint of everything that decides the result."""
    architecture: Architecture
    source: Callable[[], Source]
    """Makes the source of batches; not called for a finished run."""
    objective: Callable[[Classifier], Objective]
    """Of the network to train, what it minimises."""
    training: Training
    """Schedule and optimiser."""
    seed: int
    """Of the first weights."""
    validation: Prepared | None
    """For the curve only; nothing is chosen by it."""
    description: str
    """For progress."""
    test: Prepared | None = None
    """For the curve only, of experiments that lay their figures beside those of others, who choose the epoch by it."""
    start: Mapping[str, Tensor] | None = None
    """State of the network to go on from; what it lacks follows from the seed."""


def fit(task: FitTask, processes: Processes, store: Store, bar_position: int | None = 0) -> Fit:
    """Train a network, or return the finished run of the same fingerprint.

    Several processes share each batch and end with the same weights; the first one writes the files. The mean of their
    gradients is that of the whole batch, but batch norm normalises each share by itself (the first process's running
    statistics are saved), and BSS chooses its samples within each share.

    Args:
        task: what to train.
        processes: where to train; not started for a finished run.
        store: where checkpoints and finished runs are kept.
        bar_position: lines below the cursor at which the progress bar is drawn; None for no bar.

    Raises:
        TrainingError: the loss is not finite; the last checkpoint is kept.
        ParameterError: the objective cannot be had with this network.
    """
    key = task.key
    finished = find_fit(store, key)
    if finished:
        return finished
    fabric = processes.start()
    classifier = first_network(task)
    # After the network: its first weights are those of its seed, whatever it minimises.
    objective = task.objective(classifier)
    run = TrainingRun(fabric, classifier, objective, task.training, store.path(f"{key}/{CHECKPOINT}"))
    (curve,) = run.train(task, [task.seed], bar_position)
    if fabric.is_global_zero:
        _keep(store, key, classifier, curve)
        store.path(f"{key}/{CHECKPOINT}").unlink(missing_ok=True)
        store.sweep(key)
    fabric.barrier()
    return Fit(store.path(f"{key}/{WEIGHTS}"), curve, reused=False)


def fit_stack(
    tasks: Sequence[FitTask],
    source: Callable[[], Source],
    processes: Processes,
    store: Store,
    bar_position: int | None = 0,
) -> None:
    """Train several small networks as one, in this process: as `fit` would each of them, within rounding.

    Args:
        tasks: what to train, which differ in key and seed alone; their own sources are not used.
        source: makes the source of the batches of all.
        processes: where to train; one.
        store: where the checkpoint and finished runs are kept.
        bar_position: lines below the cursor at which the progress bar is drawn; None for no bar.

    Raises:
        TrainingError: the loss of one is not finite; the last checkpoint is kept.
    """
    first, seeds = tasks[0], [task.seed for task in tasks]
    members = [first_network(task) for task in tasks]
    stack = Stack(members)
    checkpoint = store.path(f"{first.key}/{STACK_CHECKPOINT}")
    run = TrainingRun(processes.start(), stack, first.objective(stack), first.training, checkpoint)
    curves = run.train(replace(first, source=source), seeds, bar_position)
    for task, member, state, curve in zip(tasks, members, stack.states(), curves, strict=True):
        if find_fit(store, task.key) is None:
            member.network.load_state_dict(state)
            _keep(store, task.key, member, curve)
        store.sweep(task.key)
    checkpoint.unlink(missing_ok=True)


def first_network(task: FitTask) -> Classifier:
    """Return the network at the start of training."""
    torch.manual_seed(task.seed)
    classifier = build(task.architecture)
    if task.start is not None:
        classifier.network.load_state_dict(task.start, strict=False)
    return classifier


def _keep(store: Store, key: str, classifier: Classifier, curve: list[dict[str, float]]) -> None:
    """Put a finished run into the store."""
    save_weights(classifier, store.path(f"{key}/{WEIGHTS}"))
    write_json(store.path(f"{key}/{CURVE}"), curve)
    for name in (WEIGHTS, CURVE):
        store.seal(f"{key}/{name}")


def processes_of(processes: Processes) -> list[int]:
    """Return what several processes add to the fingerprint of a fit; nothing for one."""
    return [processes.count] if processes.several else []


def find_fit(store: Store, key: str) -> Fit | None:
    """Return the finished run of a fingerprint, if there is one."""
    weights, curve = store.find(f"{key}/{WEIGHTS}"), store.find(f"{key}/{CURVE}")
    return Fit(weights, json.loads(curve.read_text(encoding="utf-8")), reused=True) if weights and curve else None


def shorten_memory(network: nn.Module, steps: int) -> None:
    """Let batch norm with a long memory see a thirtieth of the training at most, or what it remembers is out of date.

    Running statistics are means over about 1 / momentum steps. torchvision's MobileNetV3 has a momentum of 0.01, made
    for hundreds of thousands of steps: after 480, it is at chance in evaluation, whatever it has learned. Layers with
    the momentum 0.1 that torch has by default, or more, stay as they are.

    Args:
        network: whose layers are changed.
        steps: of the whole training.
    """
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.momentum is not None:
            layer.momentum = max(layer.momentum, min(USUAL_MOMENTUM, MEMORIES / steps))


class TrainingRun:
    """A network, or a stack of them, in training, with its optimiser, schedule and checkpoint."""

    def __init__(
        self, fabric: Fabric, classifier: Classifier, objective: Objective, training: Training, checkpoint: Path
    ) -> None:
        classifier = move_to_(classifier, fabric.device, training.precision == "bf16-mixed")
        objective.terms.to(fabric.device)
        self.frozen = _frozen_layers(classifier, training.frozen)
        trained = [each for each in classifier.parameters() if each.requires_grad] + [*objective.terms.parameters()]
        optimizer = _optimizer(trained, training)
        self.fabric, self.objective, self.training, self.checkpoint = fabric, objective, training, checkpoint
        self.classifier = classifier
        self.trained = trained
        self.model, self.optimizer = fabric.setup(classifier, optimizer)
        self.mean = AveragedModel(classifier, use_buffers=True) if training.averaged else None
        self.curves: list[list[dict[str, float]]] = [[] for _ in range(members_of(classifier))]
        self.saved = time.monotonic()

    def train(self, task: FitTask, seeds: Sequence[int], bar_position: int | None) -> list[list[dict[str, float]]]:
        """Train all epochs that are missing; returns the curve of each member."""
        self._resume()
        source, epochs = task.source(), self.training.epochs
        shorten_memory(self.classifier, epochs * math.ceil(source.rows / self.training.batch_size))
        done = len(self.curves[0])
        with tqdm(
            total=epochs,
            initial=done,
            desc=task.description,
            unit="epoch",
            position=bar_position,
            disable=None if self.fabric.is_global_zero and bar_position is not None else True,
            leave=False,
        ) as bar:
            for epoch in range(done, epochs):
                # For layers that draw, such as dropout: in every process something else.
                torch.manual_seed(task.seed * epochs + epoch + self.fabric.global_rank)
                moment = self.objective.moment(epoch, epochs)
                losses = self.train_epoch(source, epoch, moment, seeds)
                network: nn.Module = self.model
                if self.mean is not None and epoch >= round(epochs * (1 - self.training.averaged), 6):
                    self.mean.update_parameters(self.classifier)
                    network = self.mean.module
                splits = {"validation_accuracy": task.validation, "test_accuracy": task.test}
                right = {
                    name: accuracies(network, len(seeds), split, self.fabric.device)
                    for name, split in splits.items()
                    if split is not None
                }
                for number, curve in enumerate(self.curves):
                    row = {"epoch": epoch + 1.0, "learning_rate": learning_rate(self.training, moment)}
                    row["loss"] = losses[number]
                    curve.append(row | {name: values[number] for name, values in right.items()})
                if self.fabric.is_global_zero and time.monotonic() - self.saved > CHECKPOINT_SECONDS:
                    self._save()
                bar.update()
        if self.mean is not None:
            self.classifier.load_state_dict(self.mean.module.state_dict())
        if not all(torch.isfinite(value).all() for value in self.classifier.state_dict().values()):
            raise TrainingError("the weights are not finite at the end: try a lower learning rate")
        return self.curves

    def train_epoch(self, source: Source, epoch: int, moment: Moment, seeds: Sequence[int]) -> list[float]:
        """Train one epoch, and return the mean loss of its steps of each member.

        The host waits for the device once, at the end.
        """
        self.model.train()
        for layer in self.frozen:
            layer.eval()  # batch norm keeps what it knows
        if moment.epoch == 0:
            self.optimizer.state.clear()  # a second stage begins without the first one's momentum
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.training, moment)
        losses = []
        for whole in source.epoch(epoch):
            batch, factor = whole.part(self.fabric.global_rank, self.fabric.world_size)
            loss = factor * self.objective.loss(self.model, batch, moment)
            self.optimizer.zero_grad()
            self.fabric.backward(loss.sum())
            if self.training.clip_norm:
                clip_grad_norm_(self.trained, self.training.clip_norm)
            self.optimizer.step()
            losses.append(loss.detach())
        values = cast(Tensor, self.fabric.all_reduce(torch.stack(losses))).double().cpu().view(-1, len(seeds))
        if not torch.isfinite(values).all():
            step, member = divmod(int((~torch.isfinite(values)).flatten().int().argmax()), len(seeds))
            of = f" of seed {seeds[member]}" if len(seeds) > 1 else ""
            kept = f"; the last good checkpoint is {self.checkpoint}" if self.checkpoint.exists() else ""
            raise TrainingError(
                f"the loss{of} is {values[step, member]} in epoch {epoch + 1}, step {step + 1}: try a lower learning "
                f"rate{kept}"
            )
        means: list[float] = values.mean(0).tolist()
        return means

    def _save(self) -> None:
        state = {
            "model": self.classifier.state_dict(),
            "terms": self.objective.terms.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mean": self.mean.state_dict() if self.mean is not None else None,
            "curves": self.curves,
        }
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(self.checkpoint, sha256(content.getvalue()).digest() + content.getvalue())
        self.saved = time.monotonic()

    def _resume(self) -> None:
        """Go on from the checkpoint, when there is a whole one."""
        if not self.checkpoint.exists():
            return
        content = self.checkpoint.read_bytes()
        digest, content = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if sha256(content).digest() != digest:
            return
        state = torch.load(io.BytesIO(content), map_location=self.fabric.device, weights_only=True)
        self.classifier.load_state_dict(state["model"])
        self.objective.terms.load_state_dict(state["terms"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.mean is not None:
            self.mean.load_state_dict(state["mean"])
        self.curves = state["curves"]


def _frozen_layers(classifier: Classifier, names: Sequence[str]) -> list[nn.Module]:
    """Return the layers of a network that are not trained, after their parameters have been told so."""
    layers = dict(classifier.network.named_modules())
    for name in names:
        if name not in layers or not name:
            known = ", ".join([each for each in layers if each][:LAYERS_NAMED])
            network = classifier.architecture.network
            raise ParameterError(f"frozen: network '{network}' has no layer '{name}', expected some of: {known}")
        layers[name].requires_grad_(False)
    return [layers[name] for name in names]


def _optimizer(parameters: list[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """Return the optimiser of a run."""
    rate, decay = training.learning_rate, training.weight_decay
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, rate, weight_decay=decay, fused=True)
    return torch.optim.SGD(
        parameters, rate, training.momentum, weight_decay=decay, nesterov=training.nesterov, fused=True
    )


def curve_csv(curves: Sequence[tuple[dict[str, Any], list[dict[str, float]]]]) -> str:
    """Return curves as CSV text: the columns that name a curve, then its values, one row an epoch."""
    rows = [{**names, **row, "epoch": int(row["epoch"])} for names, curve in curves for row in curve]
    return csv_text(list(rows[0]) if rows else CURVE_COLUMNS, rows)
