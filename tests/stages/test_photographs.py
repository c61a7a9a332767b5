"""Photographs larger than what networks see: views by resized crops, with other colours, through all stages."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.images.prepared import read_prepared
from pipeline.shards.reader import BoundaryShards
from pipeline.student.shard_source import ShardSource
from tests.support.files import run_stage, tiny_images, write_params

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
