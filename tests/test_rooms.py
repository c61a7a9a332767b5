"""The structure: which rooms a stage needs, and where tests lie. Layers are contracts in setup.cfg, for `make lint`."""

import ast
import re

import pytest
from ruamel.yaml import YAML

from pipeline.core.provenance import ROOT, WITHOUT_EFFECT, imported_by, path_of
from tests.support.rooms import closure_of, modules_of, rooms_of

STAGES = ("prepare", "teacher", "attack", "student", "evaluate", "report")
BY_NAME = {"student": {"pipeline/losses"}}  # rooms whose modules a stage finds by names in its parameters


def stages():
    return YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]


@pytest.mark.parametrize("stage", STAGES)
def test_deps_name_the_rooms_that_a_stage_imports(stage):
    declared = {path for path in stages()[stage]["deps"] if path.startswith(("pipeline/", "stages/"))}
    assert declared == rooms_of(stage) | BY_NAME.get(stage, set())


def test_what_runs_code_of_the_user_depends_on_it():
    with_code = {name for name, stage in stages().items() if "${code}" in stage["deps"]}
    assert with_code == {name for name in STAGES if "pipeline/networks" in rooms_of(name)}


def test_stages_import_no_other_stage():
    for name in modules_of("stages") - {"stages.cli"}:
        assert {module for module in imported_by(name) if module.startswith("stages.")} <= {"stages.cli"}, name


def test_runtime_is_in_no_stages_parameters():
    for stage in stages().values():
        assert not any(str(name).startswith("runtime") for name in stage["params"])


def test_params_are_sections():
    sections = YAML(typ="safe").load(ROOT / "params.yaml").keys() | {"method.${item.method}"}
    for stage in stages().values():
        assert set(stage["params"]) <= sections


def test_the_pipeline_fits_on_two_screens():
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 100


def test_modules_import_from_modules():
    """Not through the `__init__` of a room, nor through the door: the module of a name can be read where it is used."""
    for module in modules_of("pipeline"):
        for node in ast.walk(ast.parse(path_of(module).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pipeline":
                assert path_of(node.module).is_file() or all(
                    path_of(f"{node.module}.{alias.name}").is_file() for alias in node.names
                ), f"{module}: from {node.module} import ..."
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "pipeline" for alias in node.names), module


def test_files_are_read_and_written_as_utf8_whatever_the_locale():
    for module in modules_of("pipeline") | modules_of("stages"):
        for node in ast.walk(ast.parse(path_of(module).read_text())):
            if not isinstance(node, ast.Call) or "encoding" in {each.arg for each in node.keywords}:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            modes = [each.value for each in node.args[1:] if isinstance(each, ast.Constant)]
            text = isinstance(node.func, ast.Name) and name == "open" and not any("b" in f"{mode}" for mode in modes)
            assert name not in ("read_text", "write_text"), f"{module}, line {node.lineno}: encoding"
            assert not text, f"{module}, line {node.lineno}: encoding"
            assert "text" not in {each.arg for each in node.keywords} or name != "run", f"{module}, line {node.lineno}"


def test_modules_without_effect_exist():
    assert WITHOUT_EFFECT.keys() <= modules_of("pipeline")


def test_every_room_says_what_it_holds_and_imports():
    rooms = list((ROOT / "pipeline").glob("*/__init__.py"))
    assert len(rooms) > 10
    for path in rooms:
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert re.search("[Ii]mports? ", docstring), path


def test_tests_are_laid_out_like_the_rooms():
    rooms = {path.parent.name for path in (ROOT / "pipeline").glob("*/__init__.py")}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders - {"stages", "docs", "benchmarks"} <= rooms
    assert rooms <= folders


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").split(".")[-1].startswith("test_"), path


def test_the_reader_needs_no_writer():
    assert not any(module.startswith("pipeline.publish") for module in closure_of("pipeline.shards.reader"))
