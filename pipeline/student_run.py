"""Training one student by one method with one seed: what it reads, its fingerprint, its source of batches."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.attack import Search
from pipeline.batches import FreshSource, Source
from pipeline.config import Params, Runtime
from pipeline.data import Prepared, read_prepared, read_validation
from pipeline.errors import DataError, ParameterError
from pipeline.forks import run_in_forks
from pipeline.methods.table import TERMS
from pipeline.models import Architecture, Classifier, build, placed
from pipeline.objective import Objective
from pipeline.online_source import OnlineSource
from pipeline.provenance import code_digest, fingerprint
from pipeline.runtime import Processes, cpu_threads, one_cpu_thread, search_batch, side_by_side
from pipeline.shard_format import manifest_digest
from pipeline.shard_reader import BoundaryShards
from pipeline.shard_source import ShardSource
from pipeline.status import Status, usable
from pipeline.storage import Store, file_digest
from pipeline.teacher import architecture_for, load_with_digest
from pipeline.training import Fit, find_fit, fit, processes_of
from pipeline.weights import load_weights

# The modules that decide what a fit gives: an edit to one of them makes finished fits invalid.
CODE = ("pipeline.runtime", "pipeline.teacher", "pipeline.training")
SOURCE_CODE = {
    "fresh": "pipeline.batches",
    "shards": "pipeline.shard_source",
    "online": "pipeline.online_source",
}


class Inputs(NamedTuple):
    """What students can be trained from; a method needs some of it."""

    train: Prepared | None
    validation: Prepared | None
    shards: BoundaryShards | None
    teacher: Path | None
    """Read by the methods that need it."""


class InputPaths(NamedTuple):
    """Where the inputs of students are."""

    shards: Path
    """Directory of the sample dataset."""
    prepared: Path
    """Directory of the prepared splits."""
    teacher: Path
    """Weights."""

    def absolute(self) -> InputPaths:
        return InputPaths(*(path.absolute() for path in self))

    def read(self, source: str) -> Inputs:
        """What methods with a source ('fresh', 'shards' or 'online') need, and prepared splits that are there.

        Raises:
            PipelineError: something that is needed is missing or damaged.
        """
        needed = source != "shards"
        train, validation = self.prepared / "train.h5", self.prepared / "validation.h5"
        if needed and not train.exists():
            raise DataError(
                f"{train}: no such prepared file, and methods with source '{source}' train on its images: make it with "
                "python -m stages.prepare, or take a method with source 'shards', which needs the sample dataset alone"
            )
        return Inputs(
            train=read_prepared(train) if needed or train.exists() else None,
            validation=read_validation(validation) if needed or validation.exists() else None,
            shards=BoundaryShards(self.shards) if source == "shards" else None,
            teacher=self.teacher,
        )


class StudentRun:
    """Fits of one student network by one method.

    Args:
        params: all parameters.
        student: name of the network.
        method: name of an entry of `params.method`.
        inputs: what is at hand.
        processes: where to train.
        store: where finished fits are kept.

    Raises:
        DataError: the method needs an input that is not at hand.
    """

    def __init__(
        self, params: Params, student: str, method: str, inputs: Inputs, processes: Processes, store: Store
    ) -> None:
        self.params, self.inputs, self.processes, self.store = params, inputs, processes, store
        self.name = f"{student}-{method}"
        self.method = params.method[method]
        self.reads: dict[str, Any] = {
            "method": self.method.model_dump(exclude_none=True),
            "training": params.training.model_dump(),
        }
        if self.method.source == "shards":
            shards = self._need(inputs.shards, "a sample dataset")
            self.reads["shards"] = manifest_digest(shards.manifest)
            manifest = shards.manifest
            self.architecture = Architecture(
                student, len(manifest.class_names), manifest.image_shape, tuple(manifest.mean), tuple(manifest.std)
            )
            if self.method.reads_features:
                self._teacher_of(shards)
        else:
            train = self._need(inputs.train, "prepared training data")
            self.architecture = architecture_for(student, train)
            self.reads["train"] = train.digest
            self.reads["augmentation"] = {"padding": params.dataset.padding, "flip": params.dataset.flip}
        if self.method.source == "online":
            path = self._need(inputs.teacher, "a teacher")
            self._teacher, self.reads["teacher"] = load_with_digest(path, train, "teacher")
            if self.method.bss:
                self.reads["search"] = params.attack.model_dump(include={"search", "tolerance", "max_gradients"})
        if inputs.validation is not None:
            self._check_validation(inputs.validation)
            self.reads["validation"] = inputs.validation.digest  # in the curve only
        code = [*CODE, SOURCE_CODE[self.method.source], *(f"pipeline.methods.{name}" for name in self.method.losses)]
        self.reads["code"] = code_digest(*code, alone=("pipeline.student_run",))
        self._shard_source: ShardSource | None = None
        if self.method.reads_features:
            self._check_features()

    def _teacher_of(self, shards: BoundaryShards) -> None:
        """The teacher itself, for its features; it must be the one that the samples are of."""
        path = self._need(self.inputs.teacher, "a teacher")
        if not path.is_file():
            raise DataError(
                f"{path}: no such file, and {self.name} reads the teacher's features, which are not in the shards: put "
                "the teacher of the samples there, or take a method that reads logits alone, as hinton, dkd or bss"
            )
        digest = file_digest(path)
        if digest != shards.manifest.digests.teacher:
            raise DataError(
                f"{path}: not the teacher of the samples in {shards.directory}, and {self.name} reads its features: "
                "take the teacher that they were made with, or make samples of this one with python -m stages.attack"
            )
        self._teacher, self.reads["teacher"] = load_weights(path), digest

    @one_cpu_thread()  # forks may follow
    def _check_features(self) -> None:
        """Refuse layers that do not exist or do not match, and stages that cannot be, before hours are spent."""
        with torch.random.fork_rng(devices=[]):
            objective = self._objective(build(self.architecture))
        objective.moment(0, self.params.training.epochs)
        if objective.first_stage and self.processes.several:
            raise ParameterError(
                f"{self.name}: a method with a first stage trains on one device: set runtime.devices to 1"
            )

    def _objective(self, student: Classifier) -> Objective:
        if not self.method.reads_features:
            return Objective(student, self.method.losses, TERMS)
        teacher = placed(self._teacher, self.processes.device).eval().requires_grad_(False)
        return Objective(student, self.method.losses, TERMS, teacher)

    def _statuses(self) -> tuple[Status, ...]:
        return usable(self.method.bss.converged_only) if self.method.bss else ()

    def _check_validation(self, validation: Prepared) -> None:
        given, expected = (len(validation.class_names), validation.image_shape), self.architecture[1:3]
        if given != expected:
            raise DataError(
                f"{self.name}: the validation split has {given[0]} classes of images {given[1]}, the training data "
                f"{expected[0]} of {expected[1]}: they are not of one dataset"
            )

    def _need(self, value: Any, what: str) -> Any:
        if value is None:
            raise DataError(f"{self.name}: needs {what} (source '{self.method.source}'), which is not there")
        return value

    def fit(self, seed: int, bar_position: int | None = 0) -> Fit:
        """Train with one seed, or find the finished run; the progress bar goes so many lines down, None for no bar."""
        return fit(
            self.processes,
            self.store,
            self.key(seed),
            self.architecture,
            lambda: self._source(seed),
            self._objective,
            self.params.training,
            seed,
            self.inputs.validation,
            f"{self.name} seed {seed}",
            bar_position,
        )

    def key(self, seed: int) -> str:
        """The fingerprint of the run with a seed."""
        return fingerprint(self.architecture._asdict(), self.reads, seed, *processes_of(self.processes))

    def unfinished(self) -> list[int]:
        """The seeds without a finished run."""
        return [seed for seed in range(self.params.seeds) if find_fit(self.store, self.key(seed)) is None]

    def fit_all(self) -> list[Fit]:
        """Train with all seeds, or find the finished runs; on a CPU side by side, in forks of this process."""
        runtime, unfinished = self.params.runtime, self.unfinished()
        workers = side_by_side(runtime, self.processes.device)
        if not self.processes.several and workers > 1 and unfinished:
            self.processes.fabric  # noqa: B018 (imported here, once for all forks)
            torch.set_num_threads(1)  # OpenMP's threads do not live on in a fork, which would wait for them for ever
            if self.method.source == "shards":
                self._shards()  # loaded here, the pages are shared by all workers
            try:
                for _ in run_in_forks([partial(self._fit_in_fork, seed) for seed in unfinished], workers):
                    pass
            finally:
                torch.set_num_threads(cpu_threads(runtime))
        fits = [self.fit(seed) for seed in range(self.params.seeds)]
        self._shard_source = None  # others may need the memory
        return [fit._replace(reused=seed not in unfinished) for seed, fit in enumerate(fits)]

    def _fit_in_fork(self, seed: int, slot: int) -> None:
        torch.set_num_threads(threads_each(self.params.runtime, self.processes.device))
        self.fit(seed, slot)

    def _source(self, seed: int) -> Source:
        batch_size, device, dataset = self.params.training.batch_size, self.processes.device, self.params.dataset
        if self.method.source == "shards":
            return self._shards().for_seed(seed)
        assert self.inputs.train is not None
        fresh = FreshSource(self.inputs.train, dataset.padding, dataset.flip, seed, batch_size, device)
        if self.method.source == "fresh":
            return fresh
        batch = search_batch(self.params.runtime, device)
        search = Search(self._teacher, self.params.attack, dataset, device, batch)
        return OnlineSource(fresh, search, self._statuses())

    def _shards(self) -> ShardSource:
        """The shards, loaded once for all seeds."""
        if self._shard_source is None:
            assert self.inputs.shards is not None
            self._shard_source = ShardSource(
                self.inputs.shards,
                0,
                self.params.training.batch_size,
                self.processes.device,
                self._statuses(),
                train=self.inputs.train,
            )
        return self._shard_source


def threads_each(runtime: Runtime, device: torch.device) -> int:
    """How many CPU threads one of them has.

    It does not depend on how many seeds there are, what is finished already or where a run is trained: it may change a
    result by rounding.
    """
    return max(1, cpu_threads(runtime) // side_by_side(runtime, device))
