"""Short fits of tiny students, for the tests of training."""

import io

import torch
from safetensors.torch import load

from pipeline.core.store import Store
from pipeline.machine.processes import Processes
from pipeline.networks.classifier import architecture_for
from pipeline.shards.reader import BoundaryShards
from pipeline.student.inputs import StudentInputs
from pipeline.student.run import StudentRun
from pipeline.training import fit as training
from pipeline.training.batches import FreshSource
from pipeline.training.fit import DIGEST_BYTES, FitTask, fit
from pipeline.training.objective import Objective
from tests.support.files import tiny_params, tiny_splits
from tests.support.helpers import CPU, view_parameters


class Recorded:
    """The batches of fresh views, and which epochs were asked for; `before(epoch)` is called first."""

    def __init__(self, before=lambda epoch: None, change=lambda batch, epoch, step: batch, batch_size=16):
        self.inner = FreshSource(
            tiny_splits()["train"], view_parameters(flip=False), seed=0, batch_size=batch_size, device=CPU
        )
        self.rows, self.before, self.change, self.epochs = self.inner.rows, before, change, []

    def epoch(self, epoch):
        self.epochs.append(epoch)
        self.before(epoch)
        for step, batch in enumerate(self.inner.epoch(epoch)):
            yield self.change(batch, epoch, step)


def fit_tiny(store, source=None, key="key", seed=0, validation=False, test=False, objective=Objective, **changes):
    defaults = {"training.epochs": 6, "training.learning_rate": 0.1}
    params = tiny_params({**defaults, **{f"training.{name}": value for name, value in changes.items()}})
    splits = tiny_splits()
    task = FitTask(
        key=key,
        architecture=architecture_for("resnet8w2", splits["train"]),
        source=(lambda: source) if isinstance(source, Recorded) else source or Recorded,
        objective=objective,
        training=params.training,
        seed=seed,
        validation=splits["validation"] if validation else None,
        test=splits["test"] if test else None,
        description="tiny",
    )
    return fit(task, Processes(params.runtime, "32-true"), Store(store))


def same_state(weights, expected):
    """Bit-identical tensors; the order of a file's metadata is not of interest here."""
    state, other = load(weights), load(expected)
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


class StoppedError(Exception):
    pass


def stop_at(epoch):
    def before(current):
        if current == epoch:
            raise StoppedError

    return before


def load_checkpoint(path):
    """What a checkpoint holds, behind its digest."""
    return torch.load(io.BytesIO(path.read_bytes()[DIGEST_BYTES:]), weights_only=True)


def state_in(checkpoint):
    return torch.load(io.BytesIO(checkpoint.read_bytes()[training.DIGEST_BYTES :]), weights_only=True)


def student_run(directory, samples, method="bss", changes=None, **inputs):
    """Fits of resnet8w2 by a method, kept below a directory."""
    params = tiny_params(changes)
    splits = tiny_splits()
    given = {"train": splits["train"], "validation": splits["validation"], "shards": None, "teacher": None}
    if params.method[method].source == "shards":
        given["shards"] = BoundaryShards(samples / "bss")
    if params.method[method].source == "online" or params.method[method].reads_features:
        given["teacher"] = samples / "teacher.safetensors"
    processes = Processes(params.runtime, params.training.precision)
    return StudentRun.of(params, "resnet8w2", method, StudentInputs(**(given | inputs)), processes, Store(directory))
