"""Photographs larger than what networks see: views by resized crops, with other colours, through all stages."""

import json
import os
import resource
import subprocess
import sys
import tarfile
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.images.prepared import read_prepared
from pipeline.shards.reader import BoundaryShards
from pipeline.student.shard_source import ShardSource
from tests.support.files import ROOT, run_stage, tiny_images, write_params
from tests.support.helpers import real_data

CHANGES = {
    "dataset.name": "imagefolder",
    "dataset.path": "pictures",
    "dataset.image_size": [12, 12],
    "dataset.train_size": [16, 20],
    "dataset.test_fraction": 0.25,
    "dataset.validation_fraction": 0.2,
    "views.padding": 0,
    "views.flip": True,
    "views.scale": [0.4, 1.0],
    "views.jitter": [0.2, 0.2, 0.2],
    "attack.embed_images": False,
    "methods": ["original", "bss"],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    images, labels = tiny_images(rows=160, shape=(3, 24, 30))
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / f"pictures/class {label}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
    write_params(folder / "params.yaml", CHANGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in ("prepare", "teacher", "attack"):
            result = run_stage(stage)
            assert result.exit_code == 0, result.stderr
        yield folder


def test_training_images_are_larger_and_all_others_as_large_as_views(project):
    train = read_prepared(project / "data/prepared/train.h5")
    assert train.images.shape[1:] == (3, 16, 20)
    assert train.view_shape == (3, 12, 12)
    np.testing.assert_array_equal(train.centred(), train.images[:, :, 2:14, 4:16])
    for name in ("validation", "test"):
        split = read_prepared(project / f"data/prepared/{name}.h5")
        assert split.images.shape[1:] == split.view_shape == (3, 12, 12)


def test_shards_are_of_version_2_and_small(project):
    manifest = BoundaryShards(project / "data/bss").manifest
    assert manifest.format_version == 2
    assert manifest.image_shape == (3, 12, 12)
    assert manifest.augmentation.scale == (0.4, 1.0)
    assert manifest.augmentation.jitter == (0.2, 0.2, 0.2)
    assert manifest.augmentation.image_size == (16, 20)
    assert manifest.columns["crop"].shape == (4,)
    assert manifest.columns["colour"].shape == (3,)
    assert "image" not in manifest.columns


def test_views_are_made_again_as_they_were_stored(project, monkeypatch):
    monkeypatch.chdir(project)
    write_params(project / "embedded.yaml", CHANGES | {"attack.embed_images": True})
    result = run_stage("attack", "--params", "embedded.yaml", "--out", "data/embedded")
    assert result.exit_code == 0, result.stderr
    train = read_prepared(project / "data/prepared/train.h5")
    bare, embedded = BoundaryShards(project / "data/bss"), BoundaryShards(project / "data/embedded")
    for resident in (True, False):
        sources = [
            ShardSource(shards, 0, 16, torch.device("cpu"), train=train, resident=resident)
            for shards in (bare, embedded)
        ]
        for ours, theirs in zip(*(source.epoch(0) for source in sources), strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert ours.images.shape[1:] == (3, 12, 12)


def test_students_train_and_are_compared(project, monkeypatch):
    monkeypatch.chdir(project)
    for stage in (("student", "--all"), ("evaluate",), ("report",)):
        result = run_stage(*stage)
        assert result.exit_code == 0, result.stderr
    metrics = json.loads((project / "reports/metrics.json").read_text())
    assert metrics["teacher"]["accuracy"] > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset.train_size": [8, 20]}, "'train_size' is at least image_size [12, 12], got [8, 20]"),
        ({"dataset.image_size": None}, "'train_size' needs 'image_size', the size of the views that are cut out"),
        ({"views.padding": 2}, "'padding' is around crops that are not resized: take it or 'scale'"),
        ({"views.scale": [0.9, 0.1]}, "'scale' takes the least value, then the largest, got [0.9, 0.1]"),
        ({"views.scale": [0.0, 1.0]}, "views.scale.0: Input should be greater than 0"),
        ({"views.jitter": [0.0, 2.0, 0.0]}, "views.jitter.1: Input should be less than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(project, monkeypatch, changes, message):
    monkeypatch.chdir(project)
    write_params(project / "wrong.yaml", CHANGES | changes)
    result = run_stage("prepare", "--params", "wrong.yaml", "--out", "elsewhere")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.real
@pytest.mark.long
def test_400_photographs_at_224_pixels_from_folders_to_a_small_network_to_ship(tmp_path, monkeypatch):
    """A network of torchvision distilled to a smaller one: minutes on two cores, and memory told."""
    archive = real_data("cifar10-jpeg.tar.gz")
    counts = Counter()
    with tarfile.open(archive) as photographs:
        for member in photographs:
            part, label = member.name.split("/")[-3:-1] if member.isfile() else ("", "")
            counts[part, label] += 1
            if part and counts[part, label] <= (40 if part == "train" else 5):
                photographs.extract(member, tmp_path / "pictures", filter="data")
    monkeypatch.chdir(tmp_path)
    changes = CHANGES | {
        "dataset.image_size": [224, 224],
        "dataset.train_size": [256, 256],
        "dataset.validation_fraction": 0.1,
        "teacher.network": "torchvision.resnet18",
        "teacher.training.epochs": 2,
        "teacher.training.learning_rate": 0.02,
        "attack.views": 1,
        "students": ["torchvision.mobilenet_v3_small"],
        "seeds": 1,
        "evaluation.similarity_images": 20,
        "runtime.threads": None,
        "runtime.workers": None,
    }
    write_params(tmp_path / "params.yaml", changes)
    begin = time.perf_counter()
    for stage in (("prepare",), ("teacher",), ("attack",), ("student", "--all"), ("evaluate",), ("report",)):
        process = subprocess.run(
            [sys.executable, "-m", f"stages.{stage[0]}", *stage[1:]],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert process.returncode == 0, process.stderr
        print(f"{stage[0]}: {time.perf_counter() - begin:.0f} s; {process.stdout.splitlines()[-1]}")
    student = "models/students/torchvision.mobilenet_v3_small-bss/seed-0.safetensors"
    result = run_stage("export", student)
    assert result.exit_code == 0, result.stderr
    print(result.stdout)
    seconds, most = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"{seconds:.0f} s in all, at most {most / 1024:,.0f} MiB in one process")
    assert seconds < 300
