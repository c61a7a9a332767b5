"""Stage evaluate: teacher and students on the test split, which no stage before it reads."""

from __future__ import annotations

import time
from pathlib import Path

import click

from pipeline.core.errors import DataError
from pipeline.core.files import atomic_directory, write_json
from pipeline.core.hdf5 import written_hdf5
from pipeline.core.parameters import load_params
from pipeline.core.store import Store, lock
from pipeline.evaluate.costs import costs_of
from pipeline.evaluate.quality import Qualities, disagreements, write_disagreements
from pipeline.evaluate.run import Comparisons
from pipeline.images.prepared import read_prepared
from pipeline.machine.device import set_up_device
from pipeline.networks.loading import load_for, load_with_digest
from stages.cli import EXIT_CODES, WORK, done, errors_in_one_line, params_option, path_option, say


@click.command(epilog=EXIT_CODES)
@params_option
@path_option("--prepared", "data/prepared", "Directory of the prepared splits.")
@path_option("--teacher", "models/teacher.safetensors", "Weights of the teacher.")
@path_option("--students", "models/students", "Directory of the students' weights.")
@path_option("--out", "reports/evaluation", "Directory for the results.")
@errors_in_one_line
def main(params_path: Path, prepared: Path, teacher: Path, students: Path, out: Path) -> None:
    """Measure teacher and students on the test split.

    Writes teacher.json and STUDENT-METHOD.json: accuracy, balanced accuracy, macro F1 (fractions), and what the network
    costs: parameters, multiply-adds of an image, bytes of its file; of students a record per seed, with agreement with
    the teacher, MagSim and AngSim. Writes pairs.h5 with the similarities of each pair of perturbations, NaN where a
    pair was left out (evenly spread images give one); confusion.h5 with the counts of images by class and predicted
    class; disagreements.h5 with the images on which students differ most from the teacher.

    \b
    Example: python -m stages.evaluate
    """
    begin = time.perf_counter()
    params = load_params(params_path)
    test = read_prepared(prepared / "test.h5")
    loaded, device = load_with_digest(teacher, test, "teacher"), set_up_device(params.runtime)
    evaluation = Comparisons(
        teacher=loaded,
        test=test,
        images=params.evaluation.similarity_images,
        runtime=params.runtime,
        device=device,
        store=Store(WORK / "comparisons"),
    )
    qualities = Qualities(teacher=loaded, test=test, device=device, store=Store(WORK / "qualities"))
    names = [f"{student}-{method}" for student in params.students for method in params.methods]
    runs = {
        (name, seed): students / name / f"seed-{seed}.safetensors" for name in names for seed in range(params.seeds)
    }
    for weights in runs.values():
        if not weights.is_file():
            raise DataError(f"{weights}: no such weights file; train it with: python -m stages.student --all")
    with lock(WORK / "evaluate.lock", say):
        compared = evaluation.compare_all(list(runs.values()))
        found = qualities.of_all([teacher, *runs.values()])
        with atomic_directory(out, "*.json", "pairs.h5", "confusion.h5", "disagreements.h5") as directory:
            of_teacher = {
                "accuracy": evaluation.teacher_accuracy(),
                "costs": costs_of(loaded.model, teacher).model_dump(),
            }
            write_json(directory / "teacher.json", of_teacher | found[teacher].means())
            # No groups: they would record when they were made.
            with written_hdf5(directory / "pairs.h5") as pairs:
                for (name, seed), weights in runs.items():
                    pairs[f"{name}-seed-{seed}-mag_sim"] = compared.comparisons[weights].magnitude
                    pairs[f"{name}-seed-{seed}-ang_sim"] = compared.comparisons[weights].angle
            with written_hdf5(directory / "confusion.h5") as confusion:
                confusion["teacher"] = found[teacher].confusion
                for (name, seed), weights in runs.items():
                    confusion[f"{name}-seed-{seed}"] = found[weights].confusion
            write_disagreements(
                directory / "disagreements.h5",
                disagreements(test, found[teacher], [found[weights] for weights in runs.values()]),
            )
            for name in names:
                records = [
                    {"seed": seed} | compared.figures(runs[name, seed]) | found[runs[name, seed]].means()
                    for seed in range(params.seeds)
                ]
                costs = costs_of(load_for(runs[name, 0], test, "student"), runs[name, 0])
                write_json(directory / f"{name}.json", {"costs": costs.model_dump(), "seeds": records})
    line = f"wrote {out}: {len(runs)} students on {len(test.labels)} test images, {compared.common.sum()} common pairs"
    done("evaluate", line, begin, compared.made > 0)


if __name__ == "__main__":
    main()
