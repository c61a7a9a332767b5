"""What README.md says is what happens."""

import re

import numpy as np

from pipeline.core.provenance import ROOT
from pipeline.networks.weights import load_weights
from pipeline.search.boundary import probability_margin
from pipeline.shards.reader import BoundaryShards
from tests.support.helpers import attack_parameters, make_shards, random_prepared, tiny_resnet

LONGEST_EXAMPLE = 10  # lines


def test_the_h5py_example_gives_samples_on_the_boundary(tmp_path, monkeypatch):
    example = re.search(
        r"<!-- example: plain h5py -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )[1]
    assert len(example.splitlines()) <= LONGEST_EXAMPLE
    teacher = tiny_resnet(0)
    shards = make_shards(tmp_path, random_prepared(0, 16, model=teacher), teacher, attack_parameters(views=1))
    (tmp_path / "data").mkdir()
    shards.rename(tmp_path / "data" / "bss")
    monkeypatch.chdir(tmp_path)
    values = {}
    exec(example, values)

    three_lines = re.search(
        r"<!-- example: three lines -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )[1]
    exec(three_lines, values)
    assert set(values["row"]) == {*values["shards"].manifest.columns, "samples"}

    stored = BoundaryShards("data/bss")
    rows = [row for row in (stored[number] for number in range(len(stored))) if row["status"][0] == 0]
    assert len(rows) == len(values["sample"]) > 0
    for row, sample in zip(rows, values["sample"], strict=True):
        np.testing.assert_allclose(sample, row["samples"][0], atol=1e-6)
    np.testing.assert_array_equal(values["base"], [row["label"] for row in rows])
    np.testing.assert_array_equal(values["target"], [row["target"][0] for row in rows])
    teacher = load_weights(tmp_path / "teacher.safetensors").eval()
    for row, logits in zip(rows, values["teacher_logits"], strict=True):
        np.testing.assert_allclose(teacher(row["samples"][:1]).detach()[0], logits, atol=1e-4)
        assert probability_margin(row["margin"][0]) <= 0.02
