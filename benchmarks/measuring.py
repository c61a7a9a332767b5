"""What all benchmarks share: real images and a real teacher, repeated runs, results as JSON lines and as Markdown."""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
import numpy as np
import torch
from torch import Tensor

from pipeline.core.files import file_digest, write_atomically
from pipeline.core.parameters import Params, load_params
from pipeline.core.provenance import ROOT
from pipeline.core.text import markdown_table
from pipeline.images.pixels import pixels
from pipeline.images.prepared import Prepared, content_digest, read_prepared
from pipeline.machine.processor import processor
from pipeline.networks.classifier import Architecture, Classifier
from pipeline.networks.fast import frozen
from pipeline.networks.loading import Loaded
from pipeline.networks.weights import load_weights
from pipeline.prepare.datasets import open_dataset
from pipeline.prepare.decode import prepare
from pipeline.search.boundary import logits_in_batches
from pipeline.search.targets import draw_targets

DATA = ROOT / os.environ.get("BOUNDARY_DATA", "../shared/data")
ARCHIVE, WEIGHTS = DATA / "cifar10-jpeg.tar.gz", DATA / "heo2019-resnet26-cifar10.safetensors"
BATCH = 256  # of training
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
Result = TypeVar("Result")
RESULTS, DOCUMENT = ROOT / "benchmarks/results", ROOT / "docs/BENCHMARKS.md"


class Searches(NamedTuple):
    """Boundary searches to be done: real images that a real teacher classifies correctly."""

    teacher: Classifier
    images: Tensor
    """(R, 3, 32, 32) float32 in [0, 1]."""
    base: Tensor
    target: Tensor
    """(R,), drawn as the attack stage draws them."""
    logits: Tensor


def real_train(images: int) -> Prepared:
    """Return so many CIFAR-10 training images, the same number of each class, in any order.

    Raises:
        click.ClickException: the files are not there.
    """
    for path in (ARCHIVE, WEIGHTS):
        if not path.is_file():
            raise click.ClickException(f"{path} is absent: set BOUNDARY_DATA to the folder that has it")
    params = load_params(ROOT / "params.yaml")
    dataset = params.dataset.model_copy(
        update={"name": "imagefolder", "path": str(ARCHIVE), "train_images": images, "validation_fraction": 0.0}
    )
    with tempfile.TemporaryDirectory() as folder, open_dataset(dataset, Path(folder)) as source:
        prepare(source, dataset, Path(folder))
        train = read_prepared(Path(folder) / "train.h5")
        order = np.random.default_rng(0).permutation(len(train.labels))
        return train._replace(images=np.array(train.images)[order], labels=train.labels[order])


def benchmark_params(device: str) -> Params:
    """Return the parameters of everything that is measured on CIFAR-10 images."""
    params = load_params(ROOT / "params.yaml")
    return params.model_copy(
        update={
            "attack": params.attack.model_copy(update={"views": 2}),
            "views": params.views.model_copy(update={"padding": 4, "flip": True}),
            "training": params.training.model_copy(update={"batch_size": BATCH}),
            "runtime": params.runtime.model_copy(update={"device": device}),
        }
    )


def first_images(train: Prepared, count: int) -> Prepared:
    """Return a smaller split, with a digest of its own."""
    images, labels = train.images[:count], train.labels[:count]
    digest = content_digest([images], train.images.shape[1:], labels, train.class_names)
    return train._replace(images=images, labels=labels, digest=digest)


def real_teacher(device: torch.device) -> Classifier:
    """Return the ResNet26 that the authors of the method published."""
    architecture = Architecture("resnet26", 10, (3, 32, 32), MEAN, STD)
    return frozen(load_weights(WEIGHTS, architecture), device)


def loaded_teacher(device: torch.device) -> Loaded:
    """Return that network with the digest of its file."""
    return Loaded(real_teacher(device), file_digest(WEIGHTS))


@torch.no_grad()
def real_searches(rows: int, device: torch.device, seed: int = 0) -> Searches:
    """Return searches from the first training images that the teacher knows."""
    train, teacher = real_train(2 * rows), real_teacher(device)
    images = pixels(torch.from_numpy(train.images).to(device))
    base = torch.from_numpy(train.labels).to(device)
    logits = logits_in_batches(teacher, images, 128)
    right = (logits.argmax(1) == base).nonzero().squeeze(1)
    right = right[torch.randperm(len(right), generator=torch.Generator().manual_seed(seed)).to(device)][:rows]
    images, base, logits = images[right], base[right], logits[right]
    noise = np.random.default_rng(seed).random(logits.shape)
    target = draw_targets(logits.cpu().numpy(), base.cpu().numpy(), noise, 1)[:, 0]
    return Searches(teacher, images, base, torch.from_numpy(target).to(device), logits)


class Spread(NamedTuple):
    """Several measurements of one quantity."""

    minimum: float
    median: float
    maximum: float
    runs: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        return cls(min(values), statistics.median(values), max(values), len(values))

    def text(self, digits: int = 0) -> str:
        """Return the median, and the range in brackets."""
        return f"{self.median:,.{digits}f} ({self.minimum:,.{digits}f} to {self.maximum:,.{digits}f})"


def seconds_of(function: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Return how long a call takes, until the device has done what it was asked to do; and what it returns."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        result = function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, result
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def machine(device: torch.device) -> str:
    """Return what was measured on, for readers of the tables."""
    cpu = f"{len(os.sched_getaffinity(0))} cores of {processor()}"
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return f"{gpu}{cpu}, Python {platform.python_version()}, torch {torch.__version__}"


def publish(name: str, device: torch.device, records: list[dict[str, Any]], text: str) -> None:
    """Write records as JSON lines, and a text into its place in docs/BENCHMARKS.md."""
    head = {"benchmark": name, "machine": machine(device)}
    write_atomically(RESULTS / f"{name}.jsonl", "".join(json.dumps(each) + "\n" for each in [head, *records]))
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(begin)
    write_atomically(DOCUMENT, f"{before}{begin}\n{text}\n\n{head['machine']}.\n{end}{rest.split(end)[1]}")
    click.echo(text)


def table(rows: list[dict[str, str]]) -> str:
    """Return a Markdown table; the first column is of words, the others of figures."""
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows], words=1)
