"""The architecture: imports go one way, and DVC knows every module that a stage depends on."""

import re

import pytest
from ruamel.yaml import YAML

from pipeline.provenance import ROOT, closure_of, imported_by, path_of

# Modules import only from layers above their own in this list.
LAYERS = (
    {"errors", "status", "networks", "provenance", "similarity", "resnet", "mlp", "projection"},
    {"metrics", "shard_layout", "storage", "config", "views", "image_files", "forks", "byte_source", "boundary"},
    {
        "shard_format",
        "shard_file",
        "runtime",
        "data",
        "datasets",
        "presets",
        "models",
        "run_record",
        "newton",
        "heo2019",
        "deepfool",
        "experiment",
    },
    {
        "preparation",
        "weights",
        "croissant",
        "spread",
        "shard_check",
        "shard_writer",
        "one_step",
        "batches",
        "prediction",
        "cluster",
        "experiment_figure",
        "doctor",
        "report.summary",
    },
    {
        "attack",
        "teacher",
        "card",
        "shard_store",
        "shard_reader",
        "shard_export",
        "evaluation",
        "term",
        "report.charts",
        "report.decision_map",
        "report.facts",
    },
    {
        "attack_run",
        "evaluation_run",
        "objective",
        "online_source",
        "shard_source",
        "shard_stream",
        "shard_rewrite",
        "methods.hinton",
        "methods.fitnet",
        "methods.at",
        "methods.fsp",
        "methods.dkd",
        "methods.rkd",
        "report.page",
        "report.samples",
    },
    {"training", "attack_worker", "attack_plan", "shard_merge", "shard_sample", "methods.bss", "report.scenes"},
    {"teacher_run", "methods.table", "report.content"},
    {"student_run"},
    {"student_worker", "experiment_run"},
)
STAGES = ("prepare", "teacher", "attack", "student", "evaluate", "report")


def modules(package):
    """Names within a package, of its own packages too: as 'storage', 'methods.at'."""
    files = (path.relative_to(ROOT / package) for path in (ROOT / package).rglob("*.py"))
    return {".".join(path.with_suffix("").parts) for path in files if path.stem != "__init__"}


def test_every_module_has_a_layer():
    assert set.union(*LAYERS) == modules("pipeline")
    assert sum(map(len, LAYERS)) == len(modules("pipeline"))
    assert {"term", "methods.at", "methods.table"} <= modules("pipeline")


def test_the_table_for_contributors_is_that_of_the_layers():
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(len(LAYERS)))
    for (_, text), layer in zip(rows, LAYERS, strict=True):
        names = re.findall(r"`([a-z0-9_.]+)`", text)
        assert len(names) == len(set(names))
        assert set(names) == layer


def test_library_imports_only_from_lower_layers():
    layer_of = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    for name, layer in layer_of.items():
        for imported in imported_by(f"pipeline.{name}"):
            package, _, other = imported.partition(".")
            assert package == "pipeline", f"pipeline.{name} imports {imported}"
            assert layer_of[other] < layer, f"pipeline.{name} imports {imported}"


def test_the_reader_never_imports_the_writer():
    assert "pipeline.shard_writer" not in closure_of("pipeline.shard_reader")


def test_stages_import_no_other_stage():
    for name in modules("stages") - {"cli"}:
        stages = {module for module in imported_by(f"stages.{name}") if module.startswith("stages.")}
        assert stages <= {"stages.cli"}, f"stages.{name} imports {stages}"


@pytest.mark.parametrize("stage", STAGES)
def test_deps_name_every_module_that_a_stage_imports(stage):
    declared = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"][stage]["deps"]
    modules_declared = {path for path in declared if path.endswith(".py")}
    assert modules_declared == {str(path_of(module)) for module in closure_of(f"stages.{stage}")}


def test_runtime_is_in_no_stages_parameters():
    for stage in YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].values():
        assert not any(str(name).startswith("runtime") for name in stage["params"])
