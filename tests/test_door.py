"""The door: what users import from `pipeline`."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import pipeline
from pipeline.losses.bss import BssTerm
from pipeline.student.shard_source import ShardSource
from pipeline.training.term import FeatureShapes, Step
from tests.support.helpers import (
    CPU,
    attack_parameters,
    bss_parameters,
    make_shards,
    random_images,
    random_prepared,
    tiny_resnet,
)


def test_all_names_are_there():
    assert {name for name in pipeline.__all__ if getattr(pipeline, name, None) is None} == set()
    assert set(pipeline.__all__) <= set(dir(pipeline))
    assert pipeline.__version__


def test_the_door_opens_at_once_and_without_torch():
    code = (
        "import sys, time; begin = time.perf_counter(); import pipeline; "
        "print(time.perf_counter() - begin, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() for _ in range(3)
    ]
    assert min(float(seconds) for seconds, _, _ in runs) < 0.1
    assert {(torch_there, numpy_there) for _, torch_there, numpy_there in runs} == {("False", "False")}


def test_status_needs_no_torch():
    code = "import sys; from pipeline import Status; assert Status.CONVERGED == 0; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_types_are_packaged():
    from importlib.resources import files

    assert files("pipeline").joinpath("py.typed").is_file()
    assert files("pipeline").joinpath("__init__.pyi").is_file()


class Plain(nn.Module):
    """Somebody's own classifier: no project class, with dropout and batch norm, trainable weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, 5)
        )

    def forward(self, x):
        return 20 * self.body(x)


def test_a_boundary_of_any_classifier():
    model, images = Plain(), random_images(1, 24, (3, 8, 8))
    model.body[3].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = pipeline.find_boundary(model, images)
    assert model.training
    assert not model.body[3].training  # each module is in the mode that it was in
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    logits = model.eval()(images).detach()
    order = logits.argsort(1, descending=True)
    assert torch.equal(found.target, order[:, 1])
    done = found.status == pipeline.Status.CONVERGED
    assert done.float().mean() > 0.8
    samples = images + found.perturbation
    assert ((samples >= -1e-6) & (samples <= 1 + 1e-6)).all()
    at_samples = model(samples).detach()
    pair = at_samples.gather(1, order[:, :2])
    assert (torch.tanh((pair[:, 0] - pair[:, 1]).abs() / 2) <= 0.0201)[done].all()
    assert torch.equal(at_samples.topk(2, 1).indices.sort(1).values[done], order[done, :2].sort(1).values)
    torch.testing.assert_close(found.boundary_logits, at_samples, rtol=0, atol=1e-4)


def test_chosen_classes_are_searched_and_a_wrong_base_is_told():
    model, images = tiny_resnet(3), random_images(2, 16)
    order = model(images).argsort(1, descending=True)
    base = order[:, 0].clone()
    base[5] = order[5, 3]
    found = pipeline.find_boundary(model, images, base, order[:, 2])
    assert torch.equal(found.target, order[:, 2])
    assert found.status[5] == pipeline.Status.BASE_MISCLASSIFIED
    assert found.perturbation[5].abs().sum() == 0


def test_a_function_is_a_classifier():
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    found = pipeline.find_boundary(lambda x: (x - 0.5).flatten(1) @ weight.T, random_images(0, 8, (1, 4, 4)))
    assert (found.status == pipeline.Status.CONVERGED).all()


@pytest.mark.parametrize("images", [torch.full((1, 1, 8, 8), 1.5), torch.full((1, 1, 8, 8), torch.nan)])
def test_images_out_of_range_are_refused(images):
    with pytest.raises(ValueError, match=r"images must be in \[0, 1\]"):
        pipeline.find_boundary(tiny_resnet(0), images)


@pytest.fixture
def shards(tmp_path):
    teacher = tiny_resnet(0)
    train = random_prepared(0, 48, model=teacher)
    return pipeline.BoundaryShards(make_shards(tmp_path, train, teacher, attack_parameters(views=1, targets=1)))


@pytest.mark.parametrize("fraction", [0.1, 0.25, 1.0])
def test_the_loss_in_a_loop_of_ones_own_is_the_one_of_the_pipeline(shards, fraction):
    """A DataLoader and `BoundaryLoss` against the pipeline's source of batches and its term."""
    student = tiny_resnet(4).requires_grad_(True)  # in evaluation: batch norm would also see the fillers, any rows
    (rows,) = DataLoader(shards, batch_size=len(shards))
    ours = pipeline.BoundaryLoss(temperature=3.0, fraction=fraction)
    loss = ours(student, student(pipeline.pixels(rows["image"])), rows)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in student.parameters()]

    (batch,) = ShardSource(shards, 0, len(shards), CPU, (pipeline.Status.CONVERGED,)).epoch(0)
    same = tiny_resnet(4).requires_grad_(True)
    step = Step(
        student=same,
        batch=batch,
        logits=same(batch.images),
        student_features={},
        teacher_features={},
        progress=0.0,
    )
    expected = BssTerm(bss_parameters(start=1.0, fraction=fraction), FeatureShapes({}, {}))(step)
    expected.backward()
    assert expected > 0.1
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    for gradient, parameter in zip(gradients, same.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)


def test_rows_that_did_not_converge_take_no_part(shards):
    student = tiny_resnet(4).train().requires_grad_(True)
    (rows,) = DataLoader(shards, batch_size=len(shards))
    rows["status"] = torch.full_like(rows["status"], pipeline.Status.BAD_GRADIENT)
    rows["boundary_logits"] = torch.full_like(rows["boundary_logits"], torch.nan)
    rows["samples"] = torch.full_like(rows["samples"], torch.nan)
    loss = pipeline.BoundaryLoss(fraction=1.0)(student, student(pipeline.pixels(rows["image"])), rows)
    loss.backward()
    assert loss == 0
    assert all(torch.isfinite(parameter.grad).all() for parameter in student.parameters())
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())  # batch norm's statistics, too


def test_streamed_rows_come_as_in_the_pipelines_own_training(tmp_path):
    teacher = tiny_resnet(0)
    train = random_prepared(0, 80, model=teacher)
    directory = make_shards(tmp_path, train, teacher, attack_parameters(views=3, targets=1, rows_per_shard=16))
    stream = pipeline.StreamedShards(directory, seed=7)
    source = ShardSource(pipeline.BoundaryShards(directory), 7, 16, CPU)
    for epoch in range(4):
        stream.set_epoch(epoch)
        streamed = list(stream)
        own = torch.cat([batch.images for batch in source.epoch(epoch)])
        assert len(streamed) == len(own) == 80  # every image once
        assert torch.equal(torch.stack([pipeline.pixels(row["image"]) for row in streamed]), own)
    everything = list(pipeline.StreamedShards(directory, all_views=True))
    assert len(everything) == 240
    counts = np.bincount([int(row["index"]) for row in everything])
    assert set(counts) == {3}
