"""Training students: what a fit follows from, and all seeds of a student by a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.core.errors import DataError, ParameterError, PipelineError, TrainingError, known_problem, shown
from pipeline.core.extensions import find_loss, is_own, own_modules
from pipeline.core.files import file_digest
from pipeline.core.parameters import Method, Params, Runtime
from pipeline.core.provenance import code_digest, fingerprint
from pipeline.core.store import Store
from pipeline.core.text import one_line
from pipeline.images.prepared import Prepared
from pipeline.machine.device import cpu_threads, one_cpu_thread, search_batch, side_by_side
from pipeline.machine.forks import run_in_forks
from pipeline.machine.processes import Processes
from pipeline.networks.classifier import Architecture, Classifier, architecture_for, build
from pipeline.networks.fast import frozen
from pipeline.networks.loading import Loaded, load_with_digest
from pipeline.networks.penultimate import PENULTIMATE
from pipeline.networks.pretrained import Start, read_start
from pipeline.networks.stack import MEMBERS, stacks_well
from pipeline.networks.weights import load_weights
from pipeline.search.table import module_of, search_of
from pipeline.shards.manifest import manifest_digest
from pipeline.shards.order import shards_by_view
from pipeline.shards.reader import BoundaryShards
from pipeline.student.inputs import StudentInputs
from pipeline.student.online_source import OnlineSource
from pipeline.student.shard_source import ShardSource, StackedShardSource
from pipeline.training.batches import FreshSource, Source, StackedFreshSource, batches_of
from pipeline.training.fit import Fit, FitTask, find_fit, fit, fit_stack, processes_of
from pipeline.training.objective import Objective
from pipeline.training.term import feature_layers, statuses_of

# The modules that decide what a fit gives: an edit to one of them makes finished fits invalid.
CODE = ("pipeline.machine.device", "pipeline.networks.classifier", "pipeline.training.fit")
SOURCE_CODE = {
    "fresh": "pipeline.training.batches",
    "shards": "pipeline.student.shard_source",
    "online": "pipeline.student.online_source",
}


def fit_code(student: str, method: Method, search: str, teacher: str | None) -> str:
    """Return the digest of the code that decides a fit.

    Args:
        student: name of the network.
        method: how it is trained.
        search: name of the search, which counts where the method searches while it trains.
        teacher: name of its network where the method reads the teacher itself.
    """
    modules = [*CODE, SOURCE_CODE[method.source]]
    modules += [f"pipeline.losses.{name}" for name in method.losses if not is_own(name)]
    modules += own_modules(student, *method.losses, *filter(None, [teacher]))
    if teacher is not None:
        modules.append("pipeline.networks.fast")
    if _searches_online(method):
        modules.append(module_of(search))
    return code_digest(*dict.fromkeys(modules), alone=("pipeline.student.run",))


def _searches_online(method: Method) -> bool:
    return method.source == "online" and bool(statuses_of(method.losses))


@dataclass(frozen=True, kw_only=True)
class StudentRun:
    """Fits of one student network by one method, one for each seed."""

    name: str
    """STUDENT-METHOD."""
    params: Params
    method: Method
    architecture: Architecture
    teacher: Loaded | None
    """Where the method reads the teacher itself."""
    inputs: StudentInputs
    reads: dict[str, Any]
    """What a fit follows from, beside architecture and seed: parameters, and digests of inputs and code."""
    processes: Processes
    """Where to train."""
    store: Store
    """Where finished fits are kept."""
    start: Start | None = None
    """What training goes on from; None for first weights that follow from the seed."""
    loaded: Callable[[], ShardSource] | None = None
    """Gives the shards, where several runs share them; otherwise each run loads them when it needs them."""

    @classmethod
    def of(
        cls, params: Params, student: str, method: str, inputs: StudentInputs, processes: Processes, store: Store
    ) -> StudentRun:
        """Put together what a student's fits need, and check that it fits, before any training.

        Args:
            params: all parameters.
            student: name of the network.
            method: name of an entry of `params.method`.
            inputs: what is at hand.
            processes: where to train.
            store: where finished fits are kept.

        Raises:
            DataError: the method needs an input that is not at hand, or inputs do not belong together.
            ParameterError: the method cannot train this network.
        """
        name, chosen = f"{student}-{method}", params.method[method]
        architecture, start = _architecture_of(student, name, chosen, inputs), None
        if given := params.pretrained.get(student):
            start = read_start(given, architecture)
            architecture = start.normalised_as(architecture)
        _check_samples(name, chosen, inputs)
        teacher = _teacher_of(name, chosen, inputs)
        run = cls(
            name=name,
            params=params,
            method=chosen,
            architecture=architecture,
            teacher=teacher,
            inputs=inputs,
            reads=_reads_of(params, chosen, architecture, teacher, inputs) | ({"start": start.digest} if start else {}),
            start=start,
            processes=processes,
            store=store,
        )
        run._check()
        return run

    def _check(self) -> None:
        """Refuse data of another kind, layers that do not match and stages that cannot be."""
        if self.inputs.validation is not None:
            _check_validation(self.name, self.inputs.validation, self.architecture)
            if self.method.source == "shards" and self.inputs.shards is not None:
                _check_order(self.name, self.inputs.validation, self.inputs.shards)
        self._check_smallest_batch()
        if not self.method.reads_features:
            return
        with one_cpu_thread(), torch.random.fork_rng(devices=[]):  # forks may follow
            objective = self._objective(build(self.architecture))
        objective.moment(0, self.params.training.epochs)
        if self.processes.several and (objective.first_stage or list(objective.terms.parameters())):
            raise ParameterError(
                f"{self.name}: a method with a first stage, or with layers of its own that are trained along, trains "
                "on one device: set runtime.devices to 1"
            )

    def _check_smallest_batch(self) -> None:
        """Refuse a network that cannot train on one image alone, as with batch norm on 1x1 maps, where it would."""
        rows, batch_size = self.rows(), self.params.training.batch_size
        smallest = min(batch.stop - batch.start for batch in batches_of(rows, batch_size)) // self.processes.count
        if smallest > 1:
            return
        with one_cpu_thread(), torch.random.fork_rng(devices=[]), torch.no_grad():
            network = build(self.architecture).train()
            try:
                network(torch.zeros(1, *self.architecture.image_shape))
            except ValueError as error:
                raise ParameterError(
                    f"{self.name}: of {rows} images in batches of {batch_size} for {self.processes.count} devices, one "
                    f"device once has a single image, on which the student cannot train ({one_line(error)}): choose "
                    "another training.batch_size, or fewer devices"
                ) from None

    def rows(self) -> int:
        """Return how many images an epoch has."""
        if self.method.source == "shards" and self.inputs.shards is not None:
            return self.inputs.shards.manifest.rows
        return len(_needed(self.inputs.train, self.name, self.method, "prepared training data").labels)

    def _objective(self, student: Classifier) -> Objective:
        features = self.method.reads_features and self.teacher is not None
        teacher = frozen(self.teacher.model, self.processes.device) if features and self.teacher else None
        smoothing = self.params.training.label_smoothing
        stored = stored_features(self.method, self.inputs.shards)
        labels = self._labels() if reads_labels(self.method) else None
        return Objective(student, self.method.losses, teacher, self.method.cross_entropy, smoothing, stored, labels)

    def _labels(self) -> NDArray[np.int64]:
        """Return the classes (N,) of all training images."""
        if self.method.source != "shards" or self.inputs.shards is None:
            return _needed(self.inputs.train, self.name, self.method, "prepared training data").labels
        shards = self.inputs.shards
        columns = [shards.read(shard, ["index", "label"]) for shard in shards_by_view(shards.manifest)[0]]
        index, label = (np.concatenate([each[name] for each in columns]) for name in ("index", "label"))
        order = index.argsort(kind="stable")
        if not np.array_equal(index[order], np.arange(len(index))):
            raise DataError(f"{self.name}: the first view in {shards.directory} does not have every image once")
        return np.asarray(label[order], np.int64)

    def fit(self, seed: int, bar_position: int | None = 0) -> Fit:
        """Train with one seed, or find the finished run.

        Args:
            seed: of the run.
            bar_position: so many lines down goes the progress bar; None for no bar.

        Raises:
            TrainingError: training cannot go on; it names student, method and seed.
        """
        with named(f"{self.name} seed {seed}"):
            return fit(self.task(seed, f"{self.name} seed {seed}"), self.processes, self.store, bar_position)

    def fit_group(self, seeds: Sequence[int], bar_position: int | None = 0) -> None:
        """Train with the seeds of a group: as one if there are several, and the shards are at hand."""
        if not self.is_stacked(seeds):
            for seed in seeds:
                self.fit(seed, bar_position)
            return
        name = f"{self.name} seeds {seeds[0]} to {seeds[-1]}"
        with named(name):
            tasks = [self.task(seed, name) for seed in seeds]
            fit_stack(tasks, partial(self.stacked_source, seeds), self.processes, self.store, bar_position)

    def is_stacked(self, seeds: Sequence[int]) -> bool:
        """Return whether the seeds of a group are trained as one: it has several, and the shards are at hand."""
        return len(seeds) > 1 and (self.method.source != "shards" or self._shards.is_resident)

    def task(self, seed: int, description: str) -> FitTask:
        """Return what a run with a seed trains."""
        return FitTask(
            key=self.key(seed),
            architecture=self.architecture,
            source=partial(self._source, seed),
            objective=self._objective,
            training=self.params.training,
            seed=seed,
            validation=self.inputs.validation,
            test=self.inputs.test,
            description=description,
            start=self.start.state if self.start else None,
        )

    def key(self, seed: int) -> str:
        """Return the fingerprint of the run with a seed."""
        return fingerprint(self.architecture._asdict(), self.reads, seed, *processes_of(self.processes))

    def unfinished(self) -> list[int]:
        """Return the seeds without a finished run."""
        return [seed for seed in range(self.params.seeds) if find_fit(self.store, self.key(seed)) is None]

    def groups(self, seeds: Iterable[int]) -> list[list[int]]:
        """Return the seeds in groups that are trained together, each seed always with the same ones.

        Small networks on a CPU are trained in stacks of one size, so that a seed's rounding does not depend on how many
        there are; seeds that nobody asked for fill a stack up, and are there when somebody does.
        """
        if not self._stacks():
            return [[seed] for seed in seeds]
        starts = dict.fromkeys(seed // MEMBERS * MEMBERS for seed in seeds)
        return [list(range(start, start + MEMBERS)) for start in starts]

    def _stacks(self) -> bool:
        return (
            self.processes.device.type == "cpu"
            and not self.processes.several
            and self.method.source != "online"
            and self.params.training.clip_norm is None  # the norm is of one student's gradients
            and all(find_loss(name).takes_stacks for name in self.method.losses)
            and stacks_well(self.architecture)
        )

    def load(self) -> None:
        """Load the shards, if the method reads them, before forks begin, which then share the pages."""
        if self.method.source == "shards":
            self._shards  # noqa: B018

    def fit_all(self) -> list[Fit]:
        """Train with all seeds, or find the finished runs; on a CPU side by side, in forks of this process."""
        unfinished = self.unfinished()
        groups = self.groups(unfinished)
        if groups:
            self.load()
        for _ in fit_side_by_side(
            [partial(self.fit_group, group) for group in groups], self.params.runtime, self.processes
        ):
            pass
        fits = [self.fit(seed) for seed in range(self.params.seeds)]
        self.__dict__.pop("_shards", None)  # others may need the memory
        return [fit._replace(reused=seed not in unfinished) for seed, fit in enumerate(fits)]

    def _source(self, seed: int) -> Source:
        if self.method.source == "shards":
            return self._shards.for_fit(seed, statuses_of(self.method.losses))
        fresh, device = self._fresh(seed), self.processes.device
        if self.teacher is None:
            return fresh
        search = search_of(self.teacher.model, self.params.search, search_batch(self.params.runtime, device), device)
        return OnlineSource(fresh, search, statuses_of(self.method.losses))

    def stacked_source(self, seeds: Sequence[int]) -> Source:
        """Return the batches of seeds that are trained as one."""
        if self.method.source == "shards":
            shards = self._shards.for_fit(seeds[0], statuses_of(self.method.losses))
            return StackedShardSource(shards, seeds)
        return StackedFreshSource(self._fresh(seeds[0]), seeds)

    def _fresh(self, seed: int) -> FreshSource:
        train = _needed(self.inputs.train, self.name, self.method, "prepared training data")
        return FreshSource(train, self.params.views, seed, self.params.training.batch_size, self.processes.device)

    @cached_property
    def _shards(self) -> ShardSource:
        """The shards, loaded once for all seeds."""
        return self.loaded() if self.loaded else load_shards([self])


Needed = TypeVar("Needed")


def _needed(value: Needed | None, name: str, method: Method, what: str) -> Needed:
    """Return an input, refused when it is not there."""
    if value is None:
        raise DataError(f"{name}: needs {what} (source '{method.source}'), which is not there")
    return value


def _architecture_of(student: str, name: str, method: Method, inputs: StudentInputs) -> Architecture:
    """Return the student's architecture, for the images of the source."""
    if method.source != "shards":
        return architecture_for(student, _needed(inputs.train, name, method, "prepared training data"))
    manifest = _needed(inputs.shards, name, method, "a sample dataset").manifest
    classes = len(manifest.class_names)
    return Architecture(student, classes, manifest.image_shape, tuple(manifest.mean), tuple(manifest.std))


def _check_samples(name: str, method: Method, inputs: StudentInputs) -> None:
    """Refuse a method that trains on boundary-supporting samples, where the shards have none."""
    if method.source != "shards" or inputs.shards is None or inputs.shards.manifest.targets:
        return
    if statuses_of(method.losses):
        raise DataError(
            f"{name}: trains on boundary-supporting samples, and {inputs.shards.directory} has none (attack.targets is "
            "0): take a method that reads logits alone, as hinton, kd, dkd or dist, or make samples"
        )


def _teacher_of(name: str, method: Method, inputs: StudentInputs) -> Loaded | None:
    """Read the teacher itself, for its features or its search; None where its logits in the shards are enough."""
    if method.source == "online":
        train = _needed(inputs.train, name, method, "prepared training data")
        return load_with_digest(_needed(inputs.teacher, name, method, "a teacher"), train, "teacher")
    if method.source != "shards" or not method.reads_features or stored_features(method, inputs.shards):
        return None
    return _teacher_of_shards(
        name,
        _needed(inputs.shards, name, method, "a sample dataset"),
        _needed(inputs.teacher, name, method, "a teacher"),
    )


def stored_features(method: Method, shards: BoundaryShards | None) -> int:
    """Return how many penultimate features of the teacher the shards have, where a method reads no others; else 0."""
    if method.source != "shards" or shards is None or "teacher_features" not in shards.manifest.columns:
        return 0
    _, layers = feature_layers(method.losses.values())
    return shards.manifest.columns["teacher_features"].shape[0] if layers == [PENULTIMATE] else 0


def reads_labels(method: Method) -> bool:
    """Return whether a loss of a method knows the classes of all training images, and which of them a batch has."""
    return any(find_loss(name).reads_labels for name in method.losses)


def _teacher_of_shards(name: str, shards: BoundaryShards, path: Path) -> Loaded:
    """Read the teacher, which must be the one that the samples are of."""
    if not path.is_file():
        raise DataError(
            f"{path}: no such file, and {name} reads the teacher's features, which are not in the shards: put "
            "the teacher of the samples there, or take a method that reads logits alone, as hinton, dkd or bss"
        )
    digest = file_digest(path)
    if digest != shards.manifest.digests.teacher:
        raise DataError(
            f"{path}: not the teacher of the samples in {shards.directory}, and {name} reads its features: "
            "take the teacher that they were made with, or make samples of this one with python -m stages.attack"
        )
    return Loaded(load_weights(path), digest)


def _reads_of(
    params: Params, method: Method, architecture: Architecture, teacher: Loaded | None, inputs: StudentInputs
) -> dict[str, Any]:
    """Return all that a fit follows from, beside architecture and seed."""
    network = None if teacher is None else teacher.model.architecture.network
    reads: dict[str, Any] = {
        "method": method.model_dump(mode="json"),
        "training": params.training.model_dump(),
        "code": fit_code(architecture.network, method, params.search.name, network),
    }
    if method.source == "shards" and inputs.shards is not None:
        reads["shards"] = manifest_digest(inputs.shards.manifest)
    elif inputs.train is not None:
        reads |= {"train": inputs.train.digest, "views": params.views.model_dump(exclude_defaults=True)}
    if teacher is not None:
        reads["teacher"] = teacher.digest
    if _searches_online(method):
        reads["search"] = params.search.model_dump(exclude_defaults=True)
    if inputs.validation is not None:
        reads["validation"] = inputs.validation.digest  # in the curve only
    if inputs.test is not None:
        reads["test"] = inputs.test.digest  # in the curve only
    return reads


def _check_validation(name: str, validation: Prepared, architecture: Architecture) -> None:
    classes, shape = len(validation.class_names), validation.view_shape
    if (classes, shape) != (architecture.classes, architecture.image_shape):
        raise DataError(
            f"{name}: the validation split has {classes} classes of images {shape}, the training data "
            f"{architecture.classes} of {architecture.image_shape}: they are not of one dataset"
        )


def _check_order(name: str, validation: Prepared, shards: BoundaryShards) -> None:
    """Refuse the classes of the samples in another order; other names may be other words for the same."""
    ours, theirs = list(validation.class_names), list(shards.manifest.class_names)
    if ours != theirs and sorted(ours) == sorted(theirs):
        place = next(number for number, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1)
        raise DataError(
            f"{name}: the samples in {shards.directory} have their classes in another order than the validation split: "
            f"class {place} is '{shown(theirs[place])}' there, '{shown(ours[place])}' here: prepare the dataset that "
            "they are of"
        )


def load_shards(runs: Sequence[StudentRun]) -> ShardSource:
    """Load the shards of runs that read the same ones, with samples if one of them uses any."""
    first = runs[0]
    statuses = next((found for run in runs if (found := statuses_of(run.method.losses))), ())
    return ShardSource(
        _needed(first.inputs.shards, first.name, first.method, "a sample dataset"),
        0,
        first.params.training.batch_size,
        first.processes.device,
        statuses,
        any(stored_features(run.method, run.inputs.shards) for run in runs),
        any(reads_labels(run.method) for run in runs),
        train=first.inputs.train,
    )


def sharing_shards(runs: Sequence[StudentRun]) -> list[StudentRun]:
    """Return runs that read the same shards, and load them once for all, when the first one needs them."""
    readers = [run for run in runs if run.method.source == "shards"]
    loaded = cache(partial(load_shards, readers))
    return [replace(run, loaded=loaded) if run.method.source == "shards" else run for run in runs]


@contextmanager
def named(description: str) -> Iterator[None]:
    """Let whatever goes wrong in training be a TrainingError that names it."""
    try:
        yield
    except PipelineError as error:
        raise TrainingError(f"{description}: {error}") from error
    except Exception as error:
        known, line = known_problem(error), f"{type(error).__name__}: {one_line(error)}"
        reason = f"{known} ({line})" if known else f"{line} (--debug shows where)"
        raise TrainingError(f"{description}: {reason}") from error


def fit_side_by_side(
    tasks: Sequence[Callable[[int], object]],
    runtime: Runtime,
    processes: Processes,
    failed: Callable[[int, PipelineError], None] | None = None,
) -> Iterator[int]:
    """Run tasks that train, on a CPU side by side in forks; yields the number of each when it has ended.

    Args:
        tasks: each is called with the number of lines down at which a progress bar may be drawn.
        runtime: the machine.
        processes: where to train.
        failed: where given, is told the number and the error of a task that failed, and the others go on.
    """
    workers = side_by_side(runtime, processes.device)
    if workers == 1 or processes.several or not tasks:
        for number, task in enumerate(tasks):
            try:
                task(0)
            except TrainingError as error:
                if failed is None:
                    raise
                failed(number, error)
            yield number
        return
    processes.start()  # what it imports is imported here, once for all forks
    torch.set_num_threads(1)  # OpenMP's threads do not live on in a fork, which would wait for them for ever
    try:
        yield from run_in_forks([partial(_in_fork, task, runtime, processes.device) for task in tasks], workers, failed)
    finally:
        torch.set_num_threads(cpu_threads(runtime))


def _in_fork(task: Callable[[int], object], runtime: Runtime, device: torch.device, slot: int) -> None:
    torch.set_num_threads(threads_each(runtime, device))
    task(slot)


def threads_each(runtime: Runtime, device: torch.device) -> int:
    """Return how many CPU threads each of several fits has.

    It does not depend on how many seeds there are, what is finished already or where a run is trained: it may change a
    result by rounding.
    """
    return cpu_threads(runtime, side_by_side(runtime, device))
