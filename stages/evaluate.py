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
from pipeline.evaluate.run import Comparisons
from pipeline.images.prepared import read_prepared
from pipeline.machine.device import set_up_device
from pipeline.networks.loading import load_with_digest
from stages.cli import EXIT_CODES, WORK, done, errors_in_one_line, params_option, path_option, say


@click.command(epilog=EXIT_CODES)
@params_option
@path_option("--prepared", "data/prepared", "Directory of the prepared splits.")
@path_option("--teacher", "models/teacher.safetensors", "Weights of the teacher.")
@path_option("--students", "models/students", "Directory of the students' weights.")
@path_option("--out", "reports/evaluation", "Directory for the results.")
@errors_in_one_line
def main(params_path: Path, prepared: Path, teacher: Path, students: Path, out: Path) -> None:
    """Measure accuracy, agreement with the teacher, MagSim and AngSim on the test split.

    Writes teacher.json, STUDENT-METHOD.json (one record per seed; fractions) and pairs.h5 with the similarities of
    each pair of perturbations, NaN where a pair was left out; evenly spread images give one.

    \b
    Example: python -m stages.evaluate
    """
    begin = time.perf_counter()
    params = load_params(params_path)
    test = read_prepared(prepared / "test.h5")
    evaluation = Comparisons(
        teacher=load_with_digest(teacher, test, "teacher"),
        test=test,
        images=params.evaluation.similarity_images,
        runtime=params.runtime,
        device=set_up_device(params.runtime),
        store=Store(WORK / "comparisons"),
    )
    names = [f"{student}-{method}" for student in params.students for method in params.methods]
    runs = {
        (name, seed): students / name / f"seed-{seed}.safetensors" for name in names for seed in range(params.seeds)
    }
    for weights in runs.values():
        if not weights.is_file():
            raise DataError(f"{weights}: no such weights file; train it with: python -m stages.student --all")
    with lock(WORK / "evaluate.lock", say):
        compared = evaluation.compare_all(list(runs.values()))
        with atomic_directory(out, "*.json", "pairs.h5") as directory:
            write_json(directory / "teacher.json", {"accuracy": evaluation.teacher_accuracy()})
            # No groups: they would record when they were made.
            with written_hdf5(directory / "pairs.h5") as pairs:
                for (name, seed), weights in runs.items():
                    pairs[f"{name}-seed-{seed}-mag_sim"] = compared.comparisons[weights].magnitude
                    pairs[f"{name}-seed-{seed}-ang_sim"] = compared.comparisons[weights].angle
            for name in names:
                records = [{"seed": seed} | compared.figures(runs[name, seed]) for seed in range(params.seeds)]
                write_json(directory / f"{name}.json", {"seeds": records})
    line = f"wrote {out}: {len(runs)} students on {len(test.labels)} test images, {compared.common.sum()} common pairs"
    done("evaluate", line, begin, compared.made > 0)


if __name__ == "__main__":
    main()
