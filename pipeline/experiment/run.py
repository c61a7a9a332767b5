"""Running an experiment: sample datasets, students and their evaluation, each run on record when it is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.attack.dataset import SampleDataset, make_samples, shard_code
from pipeline.core.errors import DataError, PipelineError, TrainingError
from pipeline.core.files import file_digest
from pipeline.core.parameters import Method, Params
from pipeline.core.provenance import fingerprint
from pipeline.core.status import Status
from pipeline.core.store import Store, lock
from pipeline.evaluate.compare import Comparison
from pipeline.evaluate.run import Comparisons, comparison_code
from pipeline.experiment.records import RunRecord, RunRecords, measures_of
from pipeline.experiment.results import BEST_EPOCH, Cell, Cost, Labels, Results, Run
from pipeline.experiment.spec import Experiment, Variant, check_comparisons, labels_of, variants
from pipeline.images.prepared import Prepared
from pipeline.machine.processes import Processes
from pipeline.machine.processor import processor
from pipeline.networks.loading import Loaded, load_with_digest
from pipeline.networks.pretrained import LIBRARY
from pipeline.prepare.splits import part_by_class
from pipeline.shards.reader import BoundaryShards
from pipeline.student.inputs import StudentInputs
from pipeline.student.run import StudentRun, fit_code, fit_side_by_side, sharing_shards
from pipeline.training.term import statuses_of

NAMED = 5  # failed runs, in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """What all runs of an experiment share."""

    train: Prepared
    validation: Prepared | None
    test: Prepared
    teacher: Path
    """Weights, of a teacher that has seen all training images; of variants that name no other."""
    work: Path
    """The private store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedRun:
    """One run of an experiment."""

    labels: Labels
    """Of its cell."""
    draw: int
    seed: int
    params: Params
    """Of its variant and draw."""
    reads: dict[str, Any]
    """What it follows from, but for the seed and the rounding of this machine."""
    wanted: str
    """Fingerprint of these and the seed."""
    code: str
    """Digest of the code that makes it."""

    @property
    def student(self) -> str:
        return self.labels["student"]

    @property
    def method(self) -> str:
        return self.labels["method"]

    @property
    def reads_shards(self) -> bool:
        return self.params.method[self.method].source == "shards"

    @property
    def place(self) -> str:
        """Its labels on the experiment's axes, for messages that name student, method and seed."""
        axes = {name: label for name, label in self.labels.items() if name not in ("student", "method")}
        return "".join(f"{name} {label}, " for name, label in axes.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentRun:
    """One experiment on one dataset."""

    experiment: Experiment
    variants: list[Variant]
    params: Params
    """All parameters, which the experiment's are laid over."""
    materials: Materials
    """What the runs share."""
    processes: Processes
    evaluations: dict[Path, Comparisons]
    """With each teacher, by its weights."""
    records: RunRecords
    """Where finished runs are kept; those that are there are not made again."""
    any_code: bool
    """Finished runs count whatever state of the code made them."""
    say: Callable[[str], None]
    """Is told of waits for another process, and of runs that failed."""

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        params: Params,
        materials: Materials,
        records: RunRecords,
        any_code: bool,
        say: Callable[[str], None],
    ) -> ExperimentRun:
        """Check what varies, and read the teachers.

        Raises:
            ParameterError: the experiment varies something that cannot be, or to a bad value.
        """
        combinations = list(variants(experiment, params))
        check_comparisons(experiment, [labels for variant in combinations for labels in labels_of(variant)])
        processes = Processes(params.runtime, params.training.precision)
        evaluations = {
            path: Comparisons(
                teacher=load_with_digest(path, materials.train, "teacher"),
                test=materials.test,
                images=params.evaluation.similarity_images,
                runtime=params.runtime,
                device=processes.device,
                store=Store(materials.work / "comparisons"),
            )
            for path in dict.fromkeys(variant.teacher or materials.teacher for variant in combinations)
        }
        return cls(
            experiment=experiment,
            variants=combinations,
            params=params,
            materials=materials,
            processes=processes,
            evaluations=evaluations,
            records=records,
            any_code=any_code,
            say=say,
        )

    def results(self) -> Results:
        """Make what is missing, and gather it.

        Raises:
            TrainingError: runs failed; the others are on record.
        """
        failed: dict[str, int] = {}
        parts = self.parts()
        runs = [run for wanted, _, _ in parts for run in wanted]
        with tqdm(total=len(runs), desc=self.experiment.title, unit="run", disable=None) as bar:
            bar.update(sum(self._record(run) is not None for run in runs))
            for part in parts:
                failed |= self._make_missing(*part, bar.update)
        if failed:
            some = "; ".join(list(failed)[:NAMED]) + ("; ..." if len(failed) > NAMED else "")
            raise TrainingError(
                f"{sum(failed.values())} of {len(runs)} runs failed, the others are kept in {self.records.folder}; "
                f"leave out of the experiment: {some}"
            )
        return self._gathered(runs)

    def parts(self) -> list[tuple[list[WantedRun], Variant, int]]:
        """Return the runs of each combination and draw."""
        draws = range(self.experiment.draws)
        return [(self._wanted(variant, draw), variant, draw) for variant in self.variants for draw in draws]

    def missing(self, wanted: Iterable[WantedRun]) -> list[WantedRun]:
        """Return the runs that are not on record, each once."""
        return list({run.wanted: run for run in wanted if self._record(run) is None}.values())

    def part(self, variant: Variant, draw: int) -> Prepared:
        """Return the training images that the students of a draw see."""
        return part_by_class(self.materials.train, variant.train_fraction, self.params.dataset.seed + draw)

    def teacher_of(self, variant: Variant) -> Path:
        """Return the weights of a combination's teacher."""
        return variant.teacher or self.materials.teacher

    def _wanted(self, variant: Variant, draw: int) -> list[WantedRun]:
        """Return the runs of one combination and draw; what does not depend on the draw is wanted for the first one."""
        train, teacher = self.part(variant, draw), self.evaluations[self.teacher_of(variant)].teacher
        attack = variant.params.attack.model_copy(update={"seed": variant.params.attack.seed + draw})
        params = variant.params.model_copy(update={"attack": attack})
        runs = []
        for labels in labels_of(variant):
            method = params.method[labels["method"]]
            if draw == 0 or method.source == "shards" or variant.train_fraction < 1:
                reads, code = self._reads_of(params, labels["student"], method, train, teacher)
                for seed in range(params.seeds):
                    wanted = fingerprint(reads, seed)
                    runs.append(
                        WantedRun(
                            labels=labels, draw=draw, seed=seed, params=params, reads=reads, wanted=wanted, code=code
                        )
                    )
        return runs

    def _reads_of(
        self, params: Params, student: str, method: Method, train: Prepared, teacher: Loaded
    ) -> tuple[dict[str, Any], str]:
        """Return what a run follows from, but for the seed and the rounding of this machine; and the code's digest."""
        materials, network = self.materials, teacher.model.architecture.network
        uses_samples = bool(statuses_of(method.losses))
        reads: dict[str, Any] = {
            "student": student,
            "method": method.model_dump(mode="json"),
            "training": params.training.model_dump(exclude_defaults=True),
            "views": params.views.model_dump(exclude_defaults=True),
            "train": train.digest,
            "validation": materials.validation.digest if materials.validation is not None else None,
            "test": materials.test.digest,
            "teacher": teacher.digest,
            "similarity_images": params.evaluation.similarity_images,
        }
        codes = [
            fit_code(student, method, params.search.name, network if method.reads_features else None),
            comparison_code(student, network),
        ]
        if method.source == "shards":
            reads["attack"] = params.attack.model_dump(exclude={"compression"}, exclude_defaults=True)
            codes.append(shard_code(params.search.name if uses_samples else None, network))
        if given := params.pretrained.get(student):
            reads["start"] = given if given == LIBRARY else file_digest(Path(given))
        if uses_samples:
            reads["search"] = params.search.model_dump(exclude_defaults=True)
        return reads, fingerprint(codes)

    def _record(self, run: WantedRun) -> RunRecord | None:
        code = None if self.any_code else run.code
        record = self.records.find(run.student, run.method, run.seed, run.wanted, code)
        if record is None or not self.experiment.best_epoch_on_test:
            return record and record.model_copy(update={BEST_EPOCH: None})
        return record if record.test_accuracy_best_epoch is not None else None

    def students(
        self, runs: Sequence[WantedRun], train: Prepared, teacher: Path, shards: BoundaryShards | None
    ) -> dict[tuple[str, str], StudentRun]:
        """Return the fits of runs of one combination and draw, by student and method."""
        test = self.materials.test if self.experiment.best_epoch_on_test else None
        inputs, store = (
            StudentInputs(train, self.materials.validation, shards, teacher, test),
            self.materials.work / "fits",
        )
        cells = list(dict.fromkeys((run.student, run.method) for run in runs))
        fits = [StudentRun.of(runs[0].params, *cell, inputs, self.processes, Store(store)) for cell in cells]
        return dict(zip(cells, sharing_shards(fits), strict=True))

    def _make_missing(
        self, wanted: list[WantedRun], variant: Variant, draw: int, done: Callable[[int], object]
    ) -> dict[str, int]:
        """Make the runs of one combination and draw that are not on record.

        Returns:
            What failed and why, and how many runs each time.
        """
        runs = self.missing(wanted)
        if not runs:
            return {}
        params, train = runs[0].params, self.part(variant, draw)
        path, cost = self.teacher_of(variant), None
        evaluation, shards = self.evaluations[path], None
        if any(run.reads_shards for run in runs):
            shards, cost = self._samples(params, train, evaluation.teacher)
        students = self.students(runs, train, path, shards)
        for student in students.values():
            student.load()
        compare = partial(evaluation.compare_one, evaluation.teacher_side())
        groups = [
            (student, seeds, [run for run in of_cell if run.seed in seeds])
            for cell, student in students.items()
            for of_cell in [[run for run in runs if (run.student, run.method) == cell]]
            for seeds in student.groups(run.seed for run in of_cell)
        ]
        failed: dict[str, int] = {}

        def note(number: int, error: PipelineError) -> None:
            of_group = groups[number][2]
            message = f"{of_group[0].place}{error}"
            failed[message] = len(of_group)
            self.say(f"error: {message}; the other runs go on")

        with ExitStack() as stack:
            for student in students.values():
                stack.enter_context(lock(self.materials.work / f"student-{student.name}.lock", self.say))
            tasks = [partial(self._make_group, *group, compare, cost) for group in groups]
            for number in fit_side_by_side(tasks, params.runtime, self.processes, note):
                done(len(groups[number][2]))
        return failed

    def _make_group(
        self,
        student: StudentRun,
        seeds: Sequence[int],
        runs: Sequence[WantedRun],
        compare: Callable[[Path], Comparison],
        cost: Cost | None,
        slot: int,
    ) -> None:
        """Train and compare the students of a group, and put on record those that are wanted."""
        begin = time.perf_counter()
        student.fit_group(seeds, slot + 1)
        training = (time.perf_counter() - begin) / len(seeds)
        for run in runs:
            begin = time.perf_counter()
            fit = student.fit(run.seed, None)  # which is finished
            measures = measures_of(compare(fit.weights))
            self.records.write(
                RunRecord(
                    student=run.student,
                    method=run.method,
                    seed=run.seed,
                    wanted=run.wanted,
                    reads=run.reads,
                    code=run.code,
                    processor=processor(),
                    seconds=round(training + time.perf_counter() - begin, 1),
                    validation=fit.curve[-1].get("validation_accuracy"),
                    test_accuracy_best_epoch=_best_epoch(fit.curve, measures["accuracy"]),
                    cost=cost if statuses_of(student.method.losses) else None,
                    **measures,
                )
            )

    def _samples(self, params: Params, train: Prepared, teacher: Loaded) -> tuple[BoundaryShards, Cost | None]:
        """Return the sample dataset of some parameters, which the next one replaces, and what its samples took."""
        store = Store(self.materials.work / "shards")
        dataset = SampleDataset.of(train, params, teacher, store)
        for _ in make_samples(dataset, teacher.model, params, dataset.missing()):
            pass
        totals = dataset.publish(self.materials.work / "experiment").totals
        shards = BoundaryShards(self.materials.work / "experiment")
        if not params.attack.targets:
            return shards, None
        evaluations = (shards.read(shard, ["evaluations"])["evaluations"] for shard in shards.manifest.shards)
        cost = Cost(
            samples=totals.samples,
            bytes=totals.bytes,
            evaluations=sum(int(each.sum()) for each in evaluations),
            converged=totals.statuses[Status.CONVERGED.name.lower()],
        )
        return shards, cost

    def _gathered(self, wanted: list[WantedRun]) -> Results:
        """Return the results of runs that are all on record."""
        materials, records = self.materials, dict[str, RunRecord]()
        for run in wanted:
            found = self._record(run)
            if found is None:
                raise DataError(f"{self.records.folder}: a record is gone, of {run.student}-{run.method}: run again")
            records[run.wanted] = found
        pairs_of: dict[str, list[NDArray[np.bool_]]] = {}
        for record in records.values():
            pairs_of.setdefault(record.reads["teacher"], []).append(record.pairs)
        common = {digest: np.asarray(np.stack(pairs).all(axis=0)) for digest, pairs in pairs_of.items()}
        cells: dict[tuple[str, ...], Cell] = {}
        for run in wanted:
            cell = cells.setdefault(tuple(run.labels.values()), Cell(labels=run.labels, runs=[], cost=None))
            while len(cell.runs) <= run.draw:
                cell.runs.append([])
            record = records[run.wanted]
            cell.runs[run.draw].append(_run_of(record, common[record.reads["teacher"]]))
            cell.cost = record.cost
        teachers = {str(path): each.teacher_accuracy() for path, each in self.evaluations.items()}
        splits = {"train": materials.train, "validation": materials.validation, "test": materials.test}
        return Results(
            title=self.experiment.title,
            dataset=self.params.dataset.name,
            teacher=teachers if len(teachers) > 1 else next(iter(teachers.values())),
            images={name: len(split.labels) for name, split in splits.items() if split is not None},
            pairs=min(int(pairs.sum()) for pairs in common.values()),
            references=self.experiment.references,
            floor=self.experiment.floor,
            costs=self.experiment.costs,
            figure=self.experiment.figure,
            codes=_states_of_code(wanted, records),
            processors=sorted({record.processor for record in records.values()}),
            cells=list(cells.values()),
        )


def _best_epoch(curve: Sequence[Mapping[str, float]], last: float) -> float | None:
    """Return the highest accuracy on test, that of the last epoch as it is on record; None where none was measured."""
    if "test_accuracy" not in curve[-1]:
        return None
    return max([last, *(row["test_accuracy"] for row in curve[:-1])])


def _states_of_code(wanted: list[WantedRun], records: Mapping[str, RunRecord]) -> int:
    """Return how many states of the code made the runs of the cell that has most of them."""
    states: dict[str, set[str]] = {}
    for run in wanted:
        states.setdefault(run.code, set()).add(records[run.wanted].code)
    return max(len(each) for each in states.values())


def _run_of(record: RunRecord, common: NDArray[np.bool_]) -> Run:
    """Return the figures of a run; similarities over the pairs that all runs have."""
    magnitude, angle = (
        float(each[common].astype(np.float64).mean()) if common.any() else None
        for each in (record.magnitude, record.angle)
    )
    shared = {name: getattr(record, name) for name in Run.model_fields.keys() & RunRecord.model_fields.keys()}
    return Run(**shared, mag_sim=magnitude, ang_sim=angle)
