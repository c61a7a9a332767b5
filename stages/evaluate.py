"""Stage evaluate: teacher and students on the test split, which no other stage reads."""

from __future__ import annotations

from pathlib import Path

import click
from tqdm import tqdm

from pipeline.config import load_params
from pipeline.data import read_prepared
from pipeline.evaluation import (
    Comparison,
    common_pairs,
    compare,
    figures_of,
    read_comparison,
    teacher_side,
    write_comparison,
)
from pipeline.models import placed
from pipeline.prediction import accuracy
from pipeline.provenance import code_digest, fingerprint
from pipeline.runtime import choose_device, search_batch
from pipeline.storage import Store, atomic_directory, lock, write_json, written_hdf5
from pipeline.teacher import load_with_digest
from stages.cli import WORK, errors_in_one_line, params_option, path_option, say


@click.command()
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

    Example: python -m stages.evaluate
    """
    params = load_params(params_path)
    test = read_prepared(prepared / "test.h5")
    model, teacher_digest = load_with_digest(teacher, test, "teacher")
    device = choose_device(params.runtime)
    batch_size, images = search_batch(params.runtime, device), params.evaluation.similarity_images
    store, code, side = Store(WORK / "comparisons"), code_digest("pipeline.evaluation"), None
    with lock(WORK / "evaluate.lock", say):
        comparisons: dict[tuple[str, int], Comparison] = {}
        names = [f"{student}-{method}" for student in params.students for method in params.methods]
        runs = [(name, seed) for name in names for seed in range(params.seeds)]
        for name, seed in tqdm(runs, desc="evaluate", unit="student", disable=None, leave=False):
            weights = students / name / f"seed-{seed}.safetensors"
            student, digest = load_with_digest(weights, test, "student")
            key = f"{fingerprint(digest, teacher_digest, test.digest, images, code)}/comparison.h5"
            if store.find(key) is None:
                side = side or teacher_side(model, test, device, batch_size, images)
                write_comparison(store.path(key), compare(student, side, test, device, batch_size))
                store.seal(key)
            comparisons[name, seed] = read_comparison(store.path(key))

        common = common_pairs(comparisons.values())
        with atomic_directory(out, "*.json", "pairs.h5") as directory:
            write_json(directory / "teacher.json", {"accuracy": accuracy(placed(model, device), test, device)})
            # No groups: they would record when they were made.
            with written_hdf5(directory / "pairs.h5") as pairs:
                for (name, seed), comparison in comparisons.items():
                    pairs[f"{name}-seed-{seed}-mag_sim"] = comparison.magnitude
                    pairs[f"{name}-seed-{seed}-ang_sim"] = comparison.angle
            for name in names:
                records = [{"seed": s} | figures_of(comparisons[name, s], common) for s in range(params.seeds)]
                write_json(directory / f"{name}.json", {"seeds": records})
    click.echo(f"wrote {out}: {len(runs)} students on {len(test.labels)} test images, {common.sum()} common pairs")


if __name__ == "__main__":
    main()
