"""What the system does around a command: full devices, locales, home folders and URLs of files in paths."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipeline import BoundaryShards, load_params, load_weights
from pipeline.core.files import local_path
from pipeline.core.provenance import ROOT
from tests.support.files import make_project, run_stage, tiny_params, write_params

FULL = "error: standard output: No space left on device\n"


def run(folder, command, stdout=subprocess.PIPE, **environment):
    return subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=120,
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    make_project(folder, {"attack.views": 1})
    ended = run(folder, "stages.attack")
    assert ended.returncode == 0, ended.stderr
    return folder


def digests(folder):
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "command",
    [
        "stages.prepare --out again",
        "stages.teacher --out again.safetensors",
        "stages.attack",
        "stages.attack --plan",
        "stages.shards verify data/bss",
        "stages.shards info data/bss",
        "stages.shards sample data/bss -n 5 --out data/preview",
        "stages.configure attack.seed=1 --params other.yaml",
        "stages.doctor",
        "stages.attack --help",
        "stages.shards --help",
    ],
)
def test_a_full_device_is_told_in_one_line(project, command):
    shutil.copy(project / "params.yaml", project / "other.yaml")
    before = digests(project / "data/bss")
    with open("/dev/full", "w") as full:
        ended = run(project, command, full)
    assert (ended.returncode, ended.stderr.decode()) == (1, FULL)
    assert digests(project / "data/bss") == before


def test_a_reader_that_has_had_enough_is_no_error(project):
    reader, writer = os.pipe()
    os.close(reader)
    ended = run(project, "stages.shards info data/bss", writer)
    os.close(writer)
    assert ended.stderr == b""


def test_what_the_system_refuses_names_the_file(project):
    ended = run(project, "stages.student --student resnet8w2 --method hinton --reports params.yaml/no")
    assert ended.returncode == 1
    (line,) = ended.stderr.decode().splitlines()
    assert line.startswith("error: params.yaml/no/")
    assert b"Traceback" in run(project, "stages.attack --debug --prepared missing").stderr


LOCALES = {
    "utf-8": {"LC_ALL": "C.UTF-8"},
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ascii, strict": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:strict"},
    "of western Europe": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "iso8859-1"},
}


@pytest.mark.parametrize("packed", ["folder", "tar"])
def test_names_are_the_same_under_every_locale(tmp_path, packed):
    generator = np.random.default_rng(0)
    for name in ("café", "жук"):
        (tmp_path / "images é" / name).mkdir(parents=True)
        for number in range(12):
            pixels = generator.integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"images é/{name}/é{number}.png")
    (tmp_path / "images é/café/bad é.png").write_text("no image")
    place = "images é"
    if packed == "tar":
        place = shutil.make_archive(str(tmp_path / "images é"), "tar", tmp_path / "images é")
    changes = {"dataset.name": "imagefolder", "dataset.path": place, "dataset.skip_bad": True, "card.title": "Käfer"}
    found = set()
    for environment in LOCALES.values() if packed == "folder" else (LOCALES["utf-8"], LOCALES["ascii"]):
        write_params(tmp_path / "params.yaml", changes)
        for command in ("stages.prepare", "stages.configure card.title=Жук attack.seed=7"):
            ended = run(tmp_path, command, **environment)
            assert ended.returncode == 0, ended.stderr
        assert load_params(tmp_path / "params.yaml").card.title == "Жук"
        found.add(hashlib.sha256((tmp_path / "data/prepared/train.h5").read_bytes()).digest())
    assert len(found) == 1


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a name that is no ASCII, and blanks."""
    folder = tmp_path / "a b é%20"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def test_paths_as_people_and_programs_write_them(home):
    assert local_path("~") == home
    assert local_path("~/x/y") == home / "x/y"
    assert local_path((home / "x").as_uri()) == home / "x"
    assert local_path("file://localhost/x%20y") == local_path("/x y")
    for same in ("x", "x/~/y", "~nobody-of-this-name/x", "a%20b"):
        assert str(local_path(same)) == str(local_path(local_path(same))) == same


def test_a_home_folder_is_found_in_parameters(home):
    changes = {"dataset.path": "~/photos", "teacher.weights": "~/mine.safetensors", "code": "~/code"}
    params = tiny_params(changes)
    found = [params.dataset.path, params.teacher.weights, params.code]
    assert found == [str(home / name) for name in ("photos", "mine.safetensors", "code")]
    (home / "code").mkdir()
    (home / "code/nets.py").write_text("def small(channels, classes, image_shape):\n    return None\n")
    assert tiny_params({"code": "~/code", "students": ["own.nets.small"]}).students == ["own.nets.small"]


@pytest.mark.parametrize("written", ["~/{}", "uri"])
def test_every_path_may_be_written_so(home, project, written):
    shutil.copytree(project, home / "p")

    def place(name):
        return (home / "p" / name).as_uri() if written == "uri" else f"~/p/{name}"

    result = run_stage(
        "attack",
        *("--params", place("params.yaml"), "--prepared", place("data/prepared")),
        *("--teacher", place("models/teacher.safetensors"), "--out", place("data/new")),
    )
    assert result.exit_code == 0, result.output
    assert (home / "p/data/new/manifest.json").is_file()
    assert not (home.parent / "~").exists()
    for command in (("verify",), ("info",), ("sample", "-n", "5", "--out", place("data/few"))):
        result = run_stage("shards", command[0], place("data/new"), *command[1:])
        assert result.exit_code == 0, result.output
    assert len(BoundaryShards(place("data/few"))) == 5
    assert load_params(place("params.yaml")) == load_params(project / "params.yaml")
    assert load_weights(place("models/teacher.safetensors")).architecture.network == "resnet8w2"
