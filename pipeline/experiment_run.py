"""Running an experiment: sample datasets, students and their evaluation, with all that is finished found in stores."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from pipeline.attack import Search
from pipeline.attack_run import SampleDataset
from pipeline.config import Params
from pipeline.data import Prepared
from pipeline.evaluation import common_pairs, figures_of
from pipeline.evaluation_run import Evaluation
from pipeline.experiment import Cell, Cost, Experiment, Labels, Results, Run, Variant, variants
from pipeline.preparation import part_by_class
from pipeline.runtime import Processes, one_cpu_thread, search_batch, side_by_side
from pipeline.shard_reader import BoundaryShards
from pipeline.status import Status
from pipeline.storage import Store
from pipeline.student_run import Inputs, StudentRun
from pipeline.teacher import load_with_digest
from pipeline.training import Fit


class Materials(NamedTuple):
    """What all runs of an experiment share."""

    train: Prepared
    validation: Prepared | None
    test: Prepared
    teacher: Path
    """Weights, of a teacher that has seen all training images."""
    work: Path
    """The private store."""


class ExperimentRun:
    """One experiment on one dataset and teacher.

    Args:
        experiment: what varies.
        params: all parameters, which the experiment's are laid over.
        materials: what the runs share.

    Raises:
        ParameterError: the experiment varies something that cannot be, or to a bad value.
    """

    def __init__(self, experiment: Experiment, params: Params, materials: Materials) -> None:
        self.experiment, self.params, self.materials = experiment, params, materials
        self.variants = list(variants(experiment, params))
        self.processes = Processes(params.runtime, params.training.precision)
        self.device = self.processes.device
        self.teacher, self.teacher_digest = load_with_digest(materials.teacher, materials.train, "teacher")

    def results(self) -> Results:
        """Make what is missing, and gather it."""
        fits: list[tuple[Labels, list[list[Fit]], Cost | None]] = []
        students = sum(len(each.params.students) * len(each.params.methods) for each in self.variants)
        bar = tqdm(total=students * self.experiment.draws, desc=self.experiment.title, unit="cell", disable=None)
        with bar:
            for variant in self.variants:
                fits += self._fits(variant, bar)
        return self._evaluated(fits)

    def _fits(self, variant: Variant, bar: tqdm[None]) -> list[tuple[Labels, list[list[Fit]], Cost | None]]:
        """The fits of each student and method under one combination, by draw and seed, and what their samples took."""
        train = part_by_class(self.materials.train, variant.train_fraction, self.params.dataset.seed)
        by_cell: dict[tuple[str, str], list[list[Fit]]] = {}
        costs: dict[tuple[str, str], Cost | None] = {}
        for draw in range(self.experiment.draws):
            attack = variant.params.attack.model_copy(update={"seed": variant.params.attack.seed + draw})
            params = variant.params.model_copy(update={"attack": attack})
            sources = {params.method[method].source for method in params.methods}
            folder = self.materials.work / "experiment"
            cost = self._samples(params, train, folder) if "shards" in sources else None
            inputs = Inputs(train, self.materials.validation, None, self.materials.teacher)
            from_shards = inputs._replace(shards=BoundaryShards(folder)) if cost else inputs
            for student in params.students:
                for method in params.methods:
                    reads_shards = params.method[method].source == "shards"
                    given = from_shards if reads_shards else inputs
                    run = StudentRun(
                        params, student, method, given, self.processes, Store(self.materials.work / "fits")
                    )
                    by_cell.setdefault((student, method), []).append(run.fit_all())
                    costs[student, method] = cost if reads_shards and params.method[method].bss else None
                    bar.update()
        return [
            (variant.labels | {"student": student, "method": method}, runs, costs[student, method])
            for (student, method), runs in by_cell.items()
        ]

    def _samples(self, params: Params, train: Prepared, folder: Path) -> Cost:
        """Publish the sample dataset of some parameters in a folder, and count what it took."""
        store = Store(self.materials.work / "shards")
        dataset = SampleDataset(train, params.dataset, params.attack, self.teacher_digest, store)
        missing = dataset.missing()
        if missing:
            with one_cpu_thread():  # forks may follow
                batch = search_batch(params.runtime, self.device)
                search = Search(self.teacher, params.attack, params.dataset, self.device, batch)
            for _ in dataset.make(search, missing, side_by_side(params.runtime, self.device)):
                pass
        totals = dataset.publish(folder).totals
        shards = BoundaryShards(folder)
        gradients = sum(
            int(shards.read(shard, ["evaluations"])["evaluations"].sum()) for shard in shards.manifest.shards
        )
        converged = totals.statuses[Status.CONVERGED.name.lower()]
        return Cost(samples=totals.samples, bytes=totals.bytes, gradients=gradients, converged=converged)

    def _evaluated(self, fits: list[tuple[Labels, list[list[Fit]], Cost | None]]) -> Results:
        test, work = self.materials.test, self.materials.work
        evaluation = Evaluation(
            self.teacher, self.teacher_digest, test, self.params, self.device, Store(work / "comparisons")
        )
        weights = [fit.weights for _, draws, _ in fits for draw in draws for fit in draw]
        with tqdm(total=len(weights), desc="evaluate", unit="student", disable=None, leave=False) as bar:
            for done in evaluation.compare_all(weights):
                bar.update(done - bar.n)
        common = common_pairs(evaluation.comparison(path) for path in weights)

        def run_of(fit: Fit) -> Run:
            figures = figures_of(evaluation.comparison(fit.weights), common)
            return Run(
                validation=fit.curve[-1].get("validation_accuracy"),
                accuracy=figures["accuracy"],
                agreement=figures["agreement"],
                mag_sim=figures["mag_sim_common"],
                ang_sim=figures["ang_sim_common"],
            )

        cells = [
            Cell(labels=labels, runs=[[run_of(fit) for fit in draw] for draw in draws], cost=cost)
            for labels, draws, cost in fits
        ]
        materials = self.materials
        splits = {"train": materials.train, "validation": materials.validation, "test": test}
        return Results(
            title=self.experiment.title,
            dataset=self.params.dataset.name,
            teacher=evaluation.teacher_accuracy(),
            images={name: len(split.labels) for name, split in splits.items() if split is not None},
            pairs=int(common.sum()),
            references=self.experiment.references,
            floor=self.experiment.floor,
            figure=self.experiment.figure,
            cells=cells,
        )
