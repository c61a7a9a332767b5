"""Datasets that were made once, of every format version that is still read."""

import json
import subprocess
import sys
import zlib

import h5py
import numpy as np
import pytest
import torch

from pipeline.core.provenance import ROOT
from pipeline.shards.check import find_problems
from pipeline.shards.format import VERSIONS
from pipeline.shards.manifest import manifest_text, read_manifest
from pipeline.shards.reader import BoundaryShards
from tests.support.helpers import features_of
from tests.support.make_golden import KINDS, digests_of, golden_images, golden_teacher
from tests.support.resizing import resized_by_whole_numbers

GOLDEN = ROOT / "tests/golden"


@pytest.mark.parametrize(("version", "kind"), [(version, kind) for version in KINDS for kind in KINDS[version]])
def test_a_golden_dataset_is_whole_and_reads_as_it_was_written(version, kind):
    directory = GOLDEN / f"version-{version}"
    manifest = read_manifest(directory / kind)
    assert manifest.format_version == version
    assert find_problems(directory / kind, manifest) == []
    assert digests_of(directory / kind) == json.loads((directory / "columns.json").read_text())[kind]


@pytest.mark.parametrize(("version", "kind"), [(version, kind) for version in KINDS for kind in KINDS[version]])
def test_the_manifest_of_a_golden_dataset_is_written_again_as_it_was(version, kind):
    path = GOLDEN / f"version-{version}" / kind / "manifest.json"
    assert manifest_text(read_manifest(path.parent)) == path.read_text()


def test_every_version_that_is_read_has_golden_datasets():
    assert tuple(KINDS) == VERSIONS


@pytest.mark.parametrize("kind", KINDS[1])
def test_rows_of_a_golden_dataset(kind):
    """The images are known; so are the views of them, by crop and flip."""
    train = golden_images(1)
    shards = BoundaryShards(GOLDEN / "version-1" / kind)
    assert len(shards) == 6 * KINDS[1][kind]["views"]
    for row in (shards[number] for number in range(len(shards))):
        padded = np.pad(train.images[int(row["index"])], ((0, 0), (1, 1), (1, 1)))
        top, left = row["crop"].tolist()
        view = padded[:, top : top + 4, left : left + 5]
        view = view[:, :, ::-1] if row["flip"] else view
        if kind == "plain":
            assert np.array_equal(row["image"].numpy(), view)
        done = row["status"].numpy() == 0
        sample = view / 255 + row["delta"].numpy() * row["delta_scale"].numpy()[:, None, None, None]
        distance = np.sqrt(((sample - view / 255) ** 2).sum((1, 2, 3)))
        np.testing.assert_allclose(distance[done], row["distance"].numpy()[done], rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS[2])
def test_rows_of_a_golden_dataset_of_resized_crops(kind):
    """docs/FORMAT.md, "Resized crops and colours", done by hand on the images, which are known."""
    train = golden_images(2)
    shards = BoundaryShards(GOLDEN / "version-2" / kind)
    assert shards.manifest.augmentation.image_size == (8, 9)
    for row in (shards[number] for number in range(len(shards))):
        image = train.images[int(row["index"])]
        view = resized_by_whole_numbers(image, row["crop"].tolist(), bool(row["flip"]), (4, 5))
        factors = row["colour"].tolist()
        for factor, others in zip(factors, (lambda v: 0 * v, mean_gray, gray), strict=True):
            view = ((view * factor + others(view) * (128 - factor) + 64) // 128).clip(0, 255)
        if kind == "plain":
            assert np.array_equal(row["image"].numpy(), view)
        if kind == "logits":
            features = features_of(golden_teacher(2), torch.from_numpy(view[None] / np.float32(255)).float())
            pooled = features["layer3"].mean((2, 3))[0]
            np.testing.assert_allclose(row["teacher_features"], pooled, rtol=5e-3, atol=1e-3)
            np.testing.assert_allclose(row["teacher_logits"], features["linear"][0], rtol=5e-3, atol=1e-2)
            continue
        done = row["status"].numpy() == 0
        sample = view / 255 + row["delta"].numpy() * row["delta_scale"].numpy()[:, None, None, None]
        distance = np.sqrt(((sample - view / 255) ** 2).sum((1, 2, 3)))
        np.testing.assert_allclose(distance[done], row["distance"].numpy()[done], rtol=1e-5)


def gray(view):
    red, green, blue = view
    return (4899 * red + 9617 * green + 1868 * blue + 8192) // 16384


def mean_gray(view):
    return int(np.floor(gray(view).mean() + 0.5))


def test_the_specification_is_enough_to_read_a_compressed_chunk():
    """docs/FORMAT.md, "Compressed columns", done by hand on bytes of the file."""
    path = GOLDEN / "version-1/gzip/view-000-block-00000.h5"
    with h5py.File(path) as file:
        column = file["boundary_logits"]
        chunk = column.id.get_chunk_info(0)
        expected = column[:]
    stored = path.read_bytes()[chunk.byte_offset :][: chunk.size]
    content = zlib.decompress(stored)
    by_significance = np.frombuffer(content, np.uint8).reshape(4, -1)
    values = np.frombuffer(by_significance.T.tobytes(), "<f4").reshape(-1, 1, 4)[: len(expected)]
    assert np.array_equal(values, expected)


def test_a_reader_of_its_own_agrees(tmp_path):
    """The reader that docs/FORMAT.md gives: h5py, NumPy and the standard library."""
    text = (ROOT / "docs/FORMAT.md").read_text()
    example = text.split("<!-- example: a reader -->\n```python\n")[1].split("```")[0]
    script = tmp_path / "reader.py"
    script.write_text(example)
    process = subprocess.run(
        [sys.executable, script, GOLDEN / "version-1/plain"], capture_output=True, text=True, check=True
    )
    rows = BoundaryShards(GOLDEN / "version-1/plain")
    converged = sum(int((rows[number]["status"] == 0).sum()) for number in range(len(rows)))
    assert process.stdout.splitlines()[-1].startswith(f"{converged} samples")
