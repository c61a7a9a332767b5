"""Similarity of decision boundaries against closed forms for linear classifiers, and against NumPy."""

import math

import numpy as np
import pytest
import torch

from pipeline.core.status import Status
from pipeline.evaluate.metrics import AngSim, MagSim
from pipeline.evaluate.similarity import (
    agreement,
    ang_sim,
    angle_similarity,
    mag_sim,
    magnitude_similarity,
    teacher_divergence,
)
from pipeline.search.boundary import judge, margin_of
from tests.support.helpers import (
    linear_classifier,
    random_images,
    random_linear_classifier,
    tiny_resnet,
    top_two,
)
from tests.support.searches import newton

NAN = math.nan


def found_perturbations(model, images, base, target):
    result = newton(model, images, base, target, levels=None)
    assert (result.status == Status.CONVERGED).all()
    return result.perturbation


def exact_perturbations(model, images, base, target):
    """-m / ||w||^2 w in float64, with w and m between base and target class."""
    weight, bias = (value.double().numpy() for value in (model.network[1].weight, model.network[1].bias))
    weight, bias = weight[base] - weight[target], bias[base] - bias[target]
    pixels = images.double().flatten(1).numpy()
    margin = (weight * pixels).sum(1) + bias
    return -(margin / (weight**2).sum(1))[:, None] * weight


def turned(model, seed, share):
    """A linear classifier between `model` (share 0) and another one (share 1), with boundaries in the box."""
    other = random_linear_classifier(seed).network[1].weight
    weight = (1 - share) * model.network[1].weight + share * other
    return linear_classifier(weight.view(-1, 1, 8, 8), -0.5 * weight.sum(1))


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_linear_classifiers_give_the_closed_forms(share, dtype, tolerance):
    teacher = random_linear_classifier(0)
    student = turned(teacher, 1, share)
    images = random_images(0, 64, low=0.4, high=0.6, dtype=torch.float64)
    base, target = top_two(teacher, images)
    expected_student = exact_perturbations(student, images, base, target)
    expected_teacher = exact_perturbations(teacher, images, base, target)
    usable = student(images).argmax(1) == base
    for model, perturbation in ((student, expected_student), (teacher, expected_teacher)):
        # The closed form is that of two classes: no third one may be in the way. In float32, logits of order 10 are
        # known to 1e-6, so a margin of 0.1 and its distance to 1e-5 of themselves.
        samples = images + torch.from_numpy(perturbation).view_as(images)
        usable &= judge(model(samples), base, target, tolerance=1e-6) == Status.CONVERGED
        usable &= margin_of(model(images), base, target) > 0.1
    images, base, target = images[usable], base[usable], target[usable]
    assert len(images) >= 15
    sizes = [np.linalg.norm(values[usable], axis=1) for values in (expected_student, expected_teacher)]
    magnitude = np.minimum(*sizes) / np.maximum(*sizes)
    angle = (expected_student * expected_teacher)[usable].sum(1) / (sizes[0] * sizes[1])

    images = images.to(dtype)
    preds = found_perturbations(student.to(dtype), images, base, target)
    truth = found_perturbations(teacher.to(dtype), images, base, target)

    np.testing.assert_allclose(magnitude_similarity(preds, truth).numpy(), magnitude, rtol=0, atol=tolerance)
    np.testing.assert_allclose(angle_similarity(preds, truth).numpy(), angle, rtol=0, atol=tolerance)
    assert mag_sim(preds, truth).item() == pytest.approx(magnitude.mean(), abs=tolerance)
    assert ang_sim(preds, truth).item() == pytest.approx(angle.mean(), abs=tolerance)
    assert magnitude.mean() < 0.99


def test_the_angle_between_parallel_and_orthogonal_boundaries():
    # Classes 0 and 1 are told apart by the first pixel; by the second; by the first, at half the distance.
    first, second = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    first[0, 0, 0, 0], second[0, 0, 0, 1] = 8.0, 8.0
    teacher = linear_classifier(first, torch.tensor([0.0, 2.0]))
    orthogonal = linear_classifier(second, torch.tensor([0.0, 2.0]))
    nearer = linear_classifier(3 * first, torch.tensor([0.0, 3 * 3.0]))
    images = torch.full((1, 1, 2, 2), 0.5)
    classes = torch.tensor([0]), torch.tensor([1])
    to_teacher, to_orthogonal, to_nearer = (
        found_perturbations(model, images, *classes) for model in (teacher, orthogonal, nearer)
    )
    np.testing.assert_allclose(to_teacher.flatten(), [-0.25, 0, 0, 0], atol=1e-6)
    assert ang_sim(to_orthogonal, to_teacher).item() == pytest.approx(0, abs=1e-6)
    assert mag_sim(to_orthogonal, to_teacher).item() == pytest.approx(1, abs=1e-5)
    assert ang_sim(to_nearer, to_teacher).item() == pytest.approx(1, abs=1e-6)
    assert mag_sim(to_nearer, to_teacher).item() == pytest.approx(0.5, abs=1e-5)


def test_identical_networks_are_perfectly_similar():
    model, images = tiny_resnet(0), random_images(0, 24)
    base, target = top_two(model, images)
    result = newton(model, images, base, target, levels=None)
    same = newton(tiny_resnet(0), images, base, target, levels=None)
    assert mag_sim(result.perturbation, same.perturbation) == pytest.approx(1, abs=1e-12)
    assert ang_sim(result.perturbation, same.perturbation) == pytest.approx(1, abs=1e-12)


def test_exact_values():
    preds = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0], [1.0, 1.0]])
    target = torch.tensor([[6.0, 8.0], [1.0, 0.0], [4.0, 0.0], [0.0, 2.0]])
    half = math.sqrt(0.5)
    np.testing.assert_allclose(magnitude_similarity(preds, target), [0.5, 0.5, 0.25, half])
    np.testing.assert_allclose(angle_similarity(preds, target), [1, 0, -1, half], atol=1e-15)
    assert mag_sim(preds, target).item() == pytest.approx((1.25 + half) / 4)
    assert ang_sim(preds, target).item() == pytest.approx(half / 4)
    # Which of the two is the student makes no difference.
    assert torch.equal(magnitude_similarity(preds, target), magnitude_similarity(target, preds))
    assert torch.equal(angle_similarity(preds, target), angle_similarity(target, preds))


def test_lengths_do_not_overflow_or_vanish_in_float32():
    preds, target = torch.full((2, 4), 1e-30), torch.full((2, 4), 1e-30)
    preds[1], target[1] = 1e30, 2e30
    np.testing.assert_allclose(magnitude_similarity(preds, target), [1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(angle_similarity(preds, target), [1, 1], rtol=1e-6)


def pairs_with_undefined_ones(seed, rows=30):
    generator = torch.Generator().manual_seed(seed)
    preds, target = (torch.randn(rows, 2, 3, 3, generator=generator) for _ in range(2))
    preds[3], target[7], preds[11, 0, 1, 1], target[12, 1, 0, 0], preds[20, 0, 0, 0] = 0, 0, NAN, NAN, torch.inf
    preds[25] = target[25] = 0
    undefined = [3, 7, 11, 12, 20, 25]
    return preds, target, undefined


def similarities_by_loop(preds, target, undefined):
    magnitude, angle = [], []
    for row in range(len(preds)):
        if row in undefined:
            continue
        p, t = preds[row].double().numpy().ravel(), target[row].double().numpy().ravel()
        lengths = math.sqrt((p**2).sum()), math.sqrt((t**2).sum())
        magnitude.append(min(lengths) / max(lengths))
        angle.append((p * t).sum() / lengths[0] / lengths[1])
    return np.mean(magnitude), np.mean(angle)


def test_zero_and_undefined_perturbations_are_left_out():
    preds, target, undefined = pairs_with_undefined_ones(0)
    for function in (magnitude_similarity, angle_similarity):
        assert torch.isnan(function(preds, target)).nonzero()[:, 0].tolist() == undefined
    magnitude, angle = similarities_by_loop(preds, target, undefined)
    assert mag_sim(preds, target).item() == pytest.approx(magnitude, rel=1e-12)
    assert ang_sim(preds, target).item() == pytest.approx(angle, rel=1e-12)


@pytest.mark.parametrize(("metric", "function"), [(MagSim, mag_sim), (AngSim, ang_sim)])
@pytest.mark.parametrize("batch_size", [1, 7, 30])
def test_metrics_over_batches_are_the_functions_over_all(metric, function, batch_size):
    preds, target, undefined = pairs_with_undefined_ones(1)
    accumulated = metric()
    for batch in zip(preds.split(batch_size), target.split(batch_size), strict=True):
        accumulated.update(*batch)
    assert accumulated.compute().item() == pytest.approx(function(preds, target).item(), rel=1e-12)
    assert accumulated.count == len(preds) - len(undefined)
    assert accumulated.left_out == len(undefined)
    accumulated.reset()
    assert accumulated.count == accumulated.left_out == 0
    accumulated.update(preds[:2], target[:2])
    assert accumulated.compute().item() == pytest.approx(function(preds[:2], target[:2]).item(), rel=1e-12)


@pytest.mark.filterwarnings("ignore:.*was called before.*update")
@pytest.mark.parametrize(("metric", "function"), [(MagSim, mag_sim), (AngSim, ang_sim)])
def test_without_pairs_there_is_no_similarity(metric, function):
    zeros = torch.zeros(3, 2)
    assert torch.isnan(function(zeros, zeros))
    accumulated = metric()
    assert torch.isnan(accumulated.compute())
    accumulated.update(zeros, zeros)
    assert torch.isnan(accumulated.compute())
    assert accumulated.left_out == 3


@pytest.mark.parametrize("function", [magnitude_similarity, angle_similarity, mag_sim, ang_sim, MagSim(), AngSim()])
@pytest.mark.parametrize(("preds", "target"), [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((3,), (3,)), ((2, 3), (2, 3, 1))])
def test_shapes_that_differ_are_refused(function, preds, target):
    with pytest.raises(ValueError, match=r"expected two tensors \(N, \.\.\.\) of one shape, got \("):
        function(torch.ones(preds), torch.ones(target))


def test_agreement_and_divergence():
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 50, 6)).astype(np.float32) * 3
    expected = np.mean(student.argmax(1) == teacher.argmax(1))
    assert 0 < expected < 1
    assert agreement(torch.tensor(student), torch.tensor(teacher)) == pytest.approx(expected)

    def log_softmax(logits):
        logits = logits.astype(np.float64)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    p, q = log_softmax(teacher), log_softmax(student)
    divergence = (np.exp(p) * (p - q)).sum(1).mean()
    assert teacher_divergence(torch.tensor(student), torch.tensor(teacher)) == pytest.approx(divergence, rel=1e-12)


def test_agreement_and_divergence_of_equal_and_opposite_outputs():
    logits = torch.tensor([[5.0, 0.0, -5.0], [0.0, 1.0, 0.5]])
    assert agreement(logits, logits) == 1
    assert agreement(logits, -logits) == 0
    assert teacher_divergence(logits, logits) == 0
    # A constant added to all logits changes nothing; logits far apart stay finite.
    assert teacher_divergence(logits + 100, logits).item() == pytest.approx(0, abs=1e-12)
    assert teacher_divergence(1000 * logits, -1000 * logits).item() == pytest.approx((10000 + 1000) / 2, rel=1e-9)
