"""Penultimate features of the teacher as a column: against the network taken apart; students without it."""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.attack.dataset import SampleDataset
from pipeline.core.errors import DataError, ParameterError, ShardError
from pipeline.core.parameters import check_params
from pipeline.core.status import Status
from pipeline.networks.classifier import Architecture, Classifier
from pipeline.networks.penultimate import penultimate_features, penultimate_size
from pipeline.shards.check import find_problems
from pipeline.shards.file import read_columns
from pipeline.shards.manifest import read_manifest
from pipeline.shards.reader import BoundaryShards
from pipeline.student.shard_source import ShardSource
from tests.support.files import (
    change_manifest,
    make_missing,
    mislabelled,
    run_stage,
    sample_dataset,
    tiny_splits,
    tiny_teacher,
    tiny_values,
)
from tests.support.fits import student_run
from tests.support.helpers import CPU, attack_parameters, features_of, make_shards, random_prepared, tiny_resnet

WITH, WITHOUT = {"attack.features": True}, {}
RKD = {"student_layers": ["penultimate"], "teacher_layers": ["penultimate"], "distance": 2.5, "angle": 5}
METHOD = {"method.rkd.rkd": RKD, "method.rkd_bss.rkd": RKD}


def train():
    return mislabelled(tiny_splits()["train"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset with features and one without, of the same views; the teacher's file lies beside them."""
    folder = tmp_path_factory.mktemp("made")
    for name, changes in {"with": WITH, "without": WITHOUT}.items():
        directory = folder / name
        directory.mkdir()
        dataset = sample_dataset(directory, train(), changes)
        make_missing(dataset, directory)
        dataset.publish(directory / "bss")
    return folder


def columns_in(directory):
    manifest = read_manifest(directory)
    shards = [read_columns(directory / shard.name, manifest.columns) for shard in manifest.shards]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in manifest.columns}


def test_features_are_those_that_the_last_layer_sees(made):
    columns = columns_in(made / "with/bss")
    features = features_of(tiny_teacher(), torch.from_numpy(columns["image"]).float() / 255)
    expected = features["layer3"].mean((2, 3))
    assert columns["teacher_features"].dtype == np.float16
    np.testing.assert_allclose(columns["teacher_features"], expected, rtol=2e-3, atol=1e-4)
    assert np.ptp(expected) > 0.1
    last = tiny_teacher().network.linear
    weight, bias = last.weight.double().numpy(), last.bias.double().numpy()
    logits = columns["teacher_features"].astype(np.float64) @ weight.T + bias
    np.testing.assert_allclose(logits, columns["teacher_logits"], rtol=0.02, atol=0.05)


def test_all_other_columns_are_as_without(made):
    found, expected = columns_in(made / "with/bss"), columns_in(made / "without/bss")
    assert found.keys() - expected.keys() == {"teacher_features"}
    for name, values in expected.items():
        assert np.array_equal(found[name], values), name


def test_a_dataset_with_features_is_whole_and_of_version_2(made, tmp_path, monkeypatch):
    manifest = read_manifest(made / "with/bss")
    assert manifest.format_version == 2
    assert find_problems(made / "with/bss", manifest) == []
    assert read_manifest(made / "without/bss").format_version == 1
    monkeypatch.chdir(tmp_path)
    assert run_stage("shards", "sample", made / "with/bss", "-n", "20", "--out", "preview").exit_code == 0
    known = {row.tobytes() for row in columns_in(made / "with/bss")["teacher_features"]}
    assert all(row.tobytes() in known for row in columns_in(tmp_path / "preview")["teacher_features"])


@pytest.mark.parametrize("shape", [[0], [-1], [10**9], [2, 8], []])
def test_impossible_numbers_of_features_are_refused(made, tmp_path, shape):
    path = tmp_path / "manifest.json"
    path.write_bytes((made / "with/bss/manifest.json").read_bytes())
    change_manifest(tmp_path, lambda values: values["columns"]["teacher_features"].__setitem__(1, shape))
    with pytest.raises(
        ShardError, match=r"manifest.json: (the columns are not those|column 'teacher_features' has an)"
    ):
        read_manifest(tmp_path)


def test_features_beyond_half_precision_are_refused(tmp_path):
    teacher = tiny_resnet(0)
    with torch.no_grad():
        teacher.network.layer3[-1].bn2.bias.fill_(1e6)
    with pytest.raises(
        ParameterError, match=r"^attack.features: float16 holds up to 65504, but the teacher's features"
    ):
        make_shards(tmp_path, random_prepared(0, 8), teacher, attack_parameters(targets=0, features=True))


ARCHITECTURE = Architecture("resnet8", 4, (1, 8, 8), (0.5,), (0.25,))
NONE_TO_HAVE = {
    "no linear layer": (nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten()), "has no linear layer"),
    "a vector for each row": (
        nn.Sequential(nn.Flatten(1, 2), nn.Linear(8, 4)),
        "the input of its last linear layer is (2, 8, 8), not one vector for each image",
    ),
}


@pytest.mark.parametrize("case", NONE_TO_HAVE)
def test_a_network_without_such_features_is_named(case):
    network, expected = NONE_TO_HAVE[case]
    model = Classifier(network, ARCHITECTURE)
    with pytest.raises(ParameterError) as caught, penultimate_features(model):
        model(torch.zeros(2, 1, 8, 8))
    assert str(caught.value).startswith("network 'resnet8': ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hooks_are_gone_afterwards():
    model = tiny_resnet(0)
    with penultimate_features(model) as found:
        model(torch.rand(3, 1, 8, 8))
        model(torch.rand(2, 1, 8, 8))
    model(torch.rand(1, 1, 8, 8))
    assert [tuple(each.shape) for each in found] == [(3, penultimate_size(model)), (2, penultimate_size(model))]


@pytest.mark.parametrize("statuses", [(), (Status.CONVERGED,)])
def test_batches_have_features_of_their_rows_resident_or_read_ahead(made, statuses):
    stored = columns_in(made / "with/bss")
    place_of = {image.tobytes(): place for place, image in enumerate(stored["image"])}
    for resident in (True, False):
        shards = BoundaryShards(made / "with/bss")
        source = ShardSource(shards, 0, 10, CPU, statuses, features=True, index=True, resident=resident)
        rows = 0
        for batch in source.epoch(0):
            images = (batch.images * 255).round().to(torch.uint8).numpy()
            places = [place_of[image.tobytes()] for image in images]
            assert np.array_equal(batch.teacher_features, stored["teacher_features"][places].astype(np.float32))
            assert batch.index.tolist() == stored["index"][places].tolist()
            some = torch.tensor([1, 0])
            assert torch.equal(batch.take(some).index, batch.index[some])
            assert torch.equal(batch.take(some).teacher_features, batch.teacher_features[some])
            rows += len(places)
        assert rows == 64


@pytest.mark.parametrize("method", ["rkd", "crd", "rkd_bss"])
def test_students_need_no_teacher(tmp_path, made, method):
    """Nearly those of the teacher itself, whose features have all digits."""
    fits = [
        student_run(tmp_path / name, made / name, method, METHOD, train=train(), **inputs).fit(0, None)
        for name, inputs in (("with", {"teacher": None}), ("without", {}))
    ]
    stored, live = ([row["loss"] for row in fit.curve] for fit in fits)
    assert stored == pytest.approx(live, rel=2e-3)


def test_without_the_column_the_teacher_is_needed(tmp_path, made):
    with pytest.raises(DataError, match="not in the shards"):
        student_run(tmp_path, made / "without", "rkd", METHOD, train=train(), teacher=tmp_path / "none.safetensors")
    with pytest.raises(DataError, match="not in the shards"):  # other layers
        student_run(tmp_path, made / "with", "rkd", train=train(), teacher=tmp_path / "none.safetensors")


def test_students_of_logits_do_not_read_features(tmp_path, made, monkeypatch):
    run = student_run(tmp_path, made / "with", "kd", train=train())
    read, names = BoundaryShards.read, set()

    def noted(self, shard, columns):
        names.update(columns)
        return read(self, shard, columns)

    monkeypatch.setattr(BoundaryShards, "read", noted)
    run.fit(0, None)
    assert names == {"label", "teacher_logits", "image"}


def test_the_parameter_decides_the_fingerprint_where_it_is_set(tmp_path):
    first, same, other = (
        sample_dataset(tmp_path, train(), changes) for changes in (WITHOUT, {"attack.features": False}, WITH)
    )
    assert isinstance(first, SampleDataset)
    assert first.fingerprint == same.fingerprint != other.fingerprint
    absent = tiny_values({"attack.features": ..., "attack.logits": ...})
    assert not check_params(absent, "params.yaml").attack.features
