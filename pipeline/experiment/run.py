"""Running an experiment: sample datasets, students and their evaluation, with all that is finished found in stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from pipeline.attack.dataset import SampleDataset, make_samples
from pipeline.core.errors import TrainingError
from pipeline.core.parameters import Params
from pipeline.core.status import Status
from pipeline.core.store import Store, lock
from pipeline.evaluate.run import Comparisons
from pipeline.experiment.results import Cell, Cost, Labels, Results, Run
from pipeline.experiment.spec import Experiment, Variant, check_comparisons, labels_of, variants
from pipeline.images.prepared import Prepared
from pipeline.machine.processes import Processes
from pipeline.networks.loading import Loaded, load_with_digest
from pipeline.prepare.splits import part_by_class
from pipeline.shards.reader import BoundaryShards
from pipeline.student.inputs import StudentInputs
from pipeline.student.run import StudentRun
from pipeline.training.fit import Fit
from pipeline.training.term import statuses_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """What all runs of an experiment share."""

    train: Prepared
    validation: Prepared | None
    test: Prepared
    teacher: Path
    """Weights, of a teacher that has seen all training images."""
    work: Path
    """The private store."""


@dataclass
class CellFits:
    """The finished training of one cell."""

    labels: Labels
    fits: list[list[Fit]] = field(default_factory=list)
    """By draw, then by seed."""
    cost: Cost | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentRun:
    """One experiment on one dataset and teacher."""

    experiment: Experiment
    variants: list[Variant]
    params: Params
    """All parameters, which the experiment's are laid over."""
    materials: Materials
    """What the runs share."""
    teacher: Loaded
    processes: Processes
    say: Callable[[str], None]
    """Is told of waits for another process."""

    @classmethod
    def of(
        cls, experiment: Experiment, params: Params, materials: Materials, say: Callable[[str], None]
    ) -> ExperimentRun:
        """Check what varies, and read the teacher.

        Raises:
            ParameterError: the experiment varies something that cannot be, or to a bad value.
        """
        combinations = list(variants(experiment, params))
        check_comparisons(experiment, [labels for variant in combinations for labels in labels_of(variant)])
        return cls(
            experiment=experiment,
            variants=combinations,
            params=params,
            materials=materials,
            teacher=load_with_digest(materials.teacher, materials.train, "teacher"),
            processes=Processes(params.runtime, params.training.precision),
            say=say,
        )

    def results(self) -> Results:
        """Make what is missing, and gather it."""
        cells = sum(len(each.params.students) * len(each.params.methods) for each in self.variants)
        fits: list[CellFits] = []
        with tqdm(total=cells * self.experiment.draws, desc=self.experiment.title, unit="cell", disable=None) as bar:
            for variant in self.variants:
                fits += self._fits(variant, bar.update)
        return self._evaluated(fits)

    def _fits(self, variant: Variant, done: Callable[[], object]) -> list[CellFits]:
        """Return the fits of each student and method under one combination; call `done` after each draw of a cell."""
        methods, store = variant.params.method, Store(self.materials.work / "fits")
        cells = {(labels["student"], labels["method"]): CellFits(labels) for labels in labels_of(variant)}
        for draw in range(self.experiment.draws):
            train = part_by_class(self.materials.train, variant.train_fraction, self.params.dataset.seed + draw)
            attack = variant.params.attack.model_copy(update={"seed": variant.params.attack.seed + draw})
            params = variant.params.model_copy(update={"attack": attack})
            inputs, cost = StudentInputs(train, self.materials.validation, None, self.materials.teacher), None
            if any(methods[method].source == "shards" for _, method in cells):
                shards, cost = self._samples(params, train)
                inputs = inputs._replace(shards=shards)
            for (student, method), cell in cells.items():
                from_shards = methods[method].source == "shards"
                if from_shards or draw == 0 or variant.train_fraction < 1:  # nothing else depends on the draw
                    run = StudentRun.of(params, student, method, inputs, self.processes, store)
                    cell.fits.append(self._fit_all(run, cell.labels))
                cell.cost = cost if from_shards and statuses_of(methods[method].losses) else None
                done()
        return list(cells.values())

    def _fit_all(self, run: StudentRun, labels: Labels) -> list[Fit]:
        with lock(self.materials.work / f"student-{run.name}.lock", self.say):  # which the stage holds, too
            try:
                return run.fit_all()
            except TrainingError as error:
                where = ", ".join(f"{name} {label}" for name, label in labels.items())
                raise TrainingError(f"{where}: {error}; or leave it out of the experiment") from error

    def _samples(self, params: Params, train: Prepared) -> tuple[BoundaryShards, Cost]:
        """Return the sample dataset of some parameters, which the next one replaces, and what it took."""
        store = Store(self.materials.work / "shards")
        dataset = SampleDataset.of(train, params, self.teacher, store)
        for _ in make_samples(dataset, self.teacher.model, params, dataset.missing()):
            pass
        totals = dataset.publish(self.materials.work / "experiment").totals
        shards = BoundaryShards(self.materials.work / "experiment")
        evaluations = (shards.read(shard, ["evaluations"])["evaluations"] for shard in shards.manifest.shards)
        cost = Cost(
            samples=totals.samples,
            bytes=totals.bytes,
            evaluations=sum(int(each.sum()) for each in evaluations),
            converged=totals.statuses[Status.CONVERGED.name.lower()],
        )
        return shards, cost

    def _evaluated(self, cells: list[CellFits]) -> Results:
        test, work = self.materials.test, self.materials.work
        evaluation = Comparisons(
            teacher=self.teacher,
            test=test,
            images=self.params.evaluation.similarity_images,
            runtime=self.params.runtime,
            device=self.processes.device,
            store=Store(work / "comparisons"),
        )
        compared = evaluation.compare_all([fit.weights for cell in cells for draw in cell.fits for fit in draw])

        def run_of(fit: Fit) -> Run:
            figures = compared.figures(fit.weights)
            return Run(
                validation=fit.curve[-1].get("validation_accuracy"),
                accuracy=figures["accuracy"],
                agreement=figures["agreement"],
                mag_sim=figures["mag_sim_common"],
                ang_sim=figures["ang_sim_common"],
            )

        materials = self.materials
        splits = {"train": materials.train, "validation": materials.validation, "test": test}
        return Results(
            title=self.experiment.title,
            dataset=self.params.dataset.name,
            teacher=evaluation.teacher_accuracy(),
            images={name: len(split.labels) for name, split in splits.items() if split is not None},
            pairs=int(compared.common.sum()),
            references=self.experiment.references,
            floor=self.experiment.floor,
            costs=self.experiment.costs,
            figure=self.experiment.figure,
            cells=[
                Cell(labels=cell.labels, runs=[[run_of(fit) for fit in draw] for draw in cell.fits], cost=cell.cost)
                for cell in cells
            ],
        )
