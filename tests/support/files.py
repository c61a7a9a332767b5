"""Tiny data, a tiny teacher, parameters and runs of stages that the tests of files and commands share."""

import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner
from ruamel.yaml import YAML
from torch.nn import functional as F

from pipeline.attack.dataset import SampleDataset
from pipeline.core.files import file_digest
from pipeline.core.parameters import check_params
from pipeline.core.provenance import ROOT
from pipeline.core.store import Store
from pipeline.core.text import place_of
from pipeline.images.prepared import write_prepared
from pipeline.networks.classifier import architecture_for, build
from pipeline.networks.loading import Loaded
from pipeline.networks.weights import load_weights, save_weights
from pipeline.prepare.splits import channel_statistics, split_by_class
from tests.support.helpers import in_memory, searching

CLASS_NAMES = ("bird", "cat", "dog", "frog")

# Values of params.yaml that are changed to make every stage a matter of seconds.
TINY = {
    "dataset.test_fraction": 0.05,
    "dataset.validation_fraction": 0.9,
    "teacher.network": "resnet8w4",
    "teacher.training.epochs": 8,
    "teacher.training.batch_size": 16,
    "attack.views": 2,
    "attack.rows_per_shard": 24,
    "students": ["resnet8w2"],
    "seeds": 2,
    "training.epochs": 2,
    "training.batch_size": 16,
    "runtime.device": "cpu",
    "runtime.threads": 1,
    "runtime.workers": 1,
}


def tiny_images(rows=120, classes=4, shape=(1, 8, 8), seed=0):
    """Images and labels: noisy copies of one random picture per class, in turn, easy to tell apart."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (classes, shape[0], -(-shape[1] // 2), -(-shape[2] // 2)))
    pictures = coarse.repeat(2, 2).repeat(2, 3)[:, :, : shape[1], : shape[2]]
    labels = np.arange(rows, dtype=np.int64) % classes
    noisy = pictures[labels] + generator.normal(0, 40, (rows, *shape))
    return np.rint(noisy.clip(0, 255)).astype(np.uint8), labels


def tiny_splits():
    """Train, validation and test of tiny images: 64, 24 and 32 rows."""
    images, labels = tiny_images()
    rest, test = split_by_class(labels, 0.25, 0)
    train, validation = (rest[rows] for rows in split_by_class(labels[rest], 0.25, 1))
    statistics = channel_statistics([images[train]])
    rows = {"train": train, "validation": validation, "test": test}
    return {name: in_memory(images[rows], labels[rows], CLASS_NAMES, *statistics) for name, rows in rows.items()}


def relabelled(split, labels):
    """The same images with other labels."""
    return in_memory(split.images, labels, split.class_names, split.mean, split.std)


def mislabelled(split, rows=5):
    """The split with wrong labels in its first rows, which any good teacher gets wrong."""
    labels = split.labels.copy()
    labels[:rows] = (labels[:rows] + 1) % len(split.class_names)
    return relabelled(split, labels)


@functools.cache
def _trained_state():
    train = tiny_splits()["train"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(architecture_for("resnet8w2", train)).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    images, labels = torch.from_numpy(train.images).float() / 255, torch.from_numpy(train.labels)
    images, labels = torch.cat([images, images.flip(3)]), torch.cat([labels, labels])
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.network.state_dict()


def tiny_teacher():
    """A resnet8w2 that tells the tiny images apart."""
    model = build(architecture_for("resnet8w2", tiny_splits()["train"]))
    model.network.load_state_dict(_trained_state())
    return model.eval().requires_grad_(False)


def tiny_values(changes=None):
    """The contents of params.yaml with tiny values and further changes by dotted key; `...` removes a key."""
    values = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    for key, value in (TINY | (changes or {})).items():
        section, last = place_of(values, key)
        if value is ...:
            del section[last]
        else:
            section[last] = value
    return values


def tiny_params(changes=None):
    return check_params(tiny_values(changes), "tiny")


def write_params(path, changes=None):
    YAML(typ="safe", pure=True).dump(tiny_values(changes), path)


def sample_dataset(directory, train, changes=None, teacher=None):
    """A sample dataset with its store and its teacher's weights in a directory; weights that are there stay."""
    params = tiny_params({"attack.seed": 5, "views.flip": True} | (changes or {}))
    weights = directory / "teacher.safetensors"
    if not weights.exists():
        save_weights(teacher or tiny_teacher(), weights)
    loaded = Loaded(load_weights(weights), file_digest(weights))
    return SampleDataset.of(train, params, loaded, Store(directory / "store"))


def make_missing(dataset, directory):
    """Make what the store lacks; returns the made blocks."""
    teacher = load_weights(directory / "teacher.safetensors")
    given = dataset.parameters["attack"]
    names = {"name": "search", "tolerance": "tolerance", "max_gradients": "max_gradients"}
    search = searching(teacher, **{name: given[key] for name, key in names.items() if key in given})
    return list(dataset.make(search, dataset.missing()))


def publish_samples(directory):
    """Make the samples of the tiny training split in `bss` of a directory; returns the directory."""
    dataset = sample_dataset(directory, tiny_splits()["train"])
    make_missing(dataset, directory)
    dataset.publish(directory / "bss")
    return directory


def make_project(directory, changes=None):
    """What `prepare` and `teacher` would leave behind, from tiny images, in seconds less."""
    for name, split in tiny_splits().items():
        write_prepared(directory / f"data/prepared/{name}.h5", split)
    save_weights(tiny_teacher(), directory / "models/teacher.safetensors")
    write_params(directory / "params.yaml", {"teacher.network": "resnet8w2"} | (changes or {}))


def change_manifest(directory, change):
    """Rewrite a manifest after `change(values)`."""
    path = directory / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def reseal(directory, name):
    """Give a manifest the size and digest of a shard as it is now, as a stranger who means harm would."""

    def change(values):
        shard = next(shard for shard in values["shards"] if shard["name"] == name)
        size = (directory / name).stat().st_size
        values["totals"]["bytes"] += size - shard["bytes"]
        shard.update(bytes=size, sha256=file_digest(directory / name))

    change_manifest(directory, change)


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def truncate(path, by=100):
    os.truncate(path, path.stat().st_size - by)


def contents(*directories):
    """The digest of every file below directories."""
    files = sorted(path for directory in directories for path in directory.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run_stage(name, *arguments):
    """Run a stage in this process and the current folder; the result has exit_code, stdout, stderr and exception."""
    return CliRunner().invoke(importlib.import_module(f"stages.{name}").main, [str(each) for each in arguments])


def start_stage(directory, name, *arguments):
    """Start `python -m stages.<name>` in a folder, with the environment of a user who has no project installed."""
    return subprocess.Popen(
        [sys.executable, "-m", f"stages.{name}", *map(str, arguments)],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


class fork_stage:  # noqa: N801 (used like start_stage)
    """A stage in a process of its own that need not import torch again: a fork of this one, in a folder.

    Its interface is the part of `subprocess.Popen` that is used here. It leads a process group, as a command in a shell
    does. With `file_size`, its files cannot grow beyond so many bytes, as on a full disk; `before` is called first.
    """

    def __init__(self, directory, name, *arguments, file_size=None, before=None):
        importlib.import_module(f"stages.{name}")
        importlib.import_module("lightning_fabric")  # imported late by stages that train, and slow
        self.outputs = [os.memfd_create(stream) for stream in ("stdout", "stderr")]
        context = multiprocessing.get_context("fork")
        self.process = context.Process(
            target=self._run, args=(directory, name, [*map(str, arguments)], file_size, before)
        )
        self.process.start()
        self.pid = self.process.pid

    def _run(self, directory, name, arguments, file_size, before):
        os.setpgrp()
        os.chdir(directory)
        for number, output in enumerate(self.outputs, 1):
            os.dup2(output, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        # What a fresh Python would have, in the place of what the test runner put there.
        sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
        threading.excepthook = threading.__excepthook__
        torch.set_num_threads(1)  # threads of the parent do not live on in a fork
        if file_size:
            limit_file_size(file_size)
        if before:
            before()
        importlib.import_module(f"stages.{name}").main(arguments, prog_name=name)

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def kill(self):
        self.process.kill()
        self.process.join()
        for output in self.outputs:
            os.close(output)

    def communicate(self, timeout):
        self.process.join(timeout)
        if self.process.is_alive():
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return tuple(Path(f"/proc/self/fd/{output}").read_text() for output in self.outputs)


def finish(process, timeout=300):
    """(exit code, stdout, stderr) of a started stage, which must end within so many seconds."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def limit_file_size(limit):
    """From now on, files of this process cannot grow beyond `limit` bytes: fails in the same calls as a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def on_full_disk(function, limit=20_000):
    """What a function returns, or the error that it raises, in a fork of this process whose files cannot grow."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def child():
        torch.set_num_threads(1)
        limit_file_size(limit)
        try:
            outcome = function()
        except Exception as error:
            outcome = error
        writer.send(outcome)

    process = context.Process(target=child)
    process.start()
    assert reader.poll(60)
    outcome = reader.recv()
    process.join()
    return outcome
