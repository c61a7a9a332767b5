"""Contrastive representation distillation against a loop from the paper's definitions, in float64."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.core.errors import ParameterError
from pipeline.losses.crd import CrdTerm, OtherClasses, contrastive_loss
from pipeline.training.batches import Batch
from pipeline.training.term import FeatureShapes
from tests.support.helpers import random_normal

LABELS = torch.tensor([2, 0, 1, 0, 2, 2, 2, 1, 0, 2, 1, 2])
SHAPES = FeatureShapes({"s": torch.Size([3])}, {"t": torch.Size([5])}, LABELS)
GIVEN = {"student_layers": ["s"], "teacher_layers": ["t"], "weight": 0.8, "negatives": 7, "size": 4}


def loss_by_loop(scores, images):
    """Of each row: the true pair is told from noise, and each drawn one is told to be noise."""
    count, total = len(scores[0]) - 1, 0.0
    for true, *drawn in scores:
        total -= math.log(true / (true + count / images))
        total -= sum(math.log(1 - score / (score + count / images)) for score in drawn)
    return total / len(scores)


@pytest.mark.parametrize("negatives", [1, 5, 300])
def test_the_loss_is_that_of_the_paper(negatives):
    scores = torch.rand(6, 1 + negatives, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.01
    assert contrastive_loss(scores, 50).item() == pytest.approx(loss_by_loop(scores.tolist(), 50), rel=1e-4)


def test_the_gradient_is_that_of_the_loss():
    scores = torch.rand(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(lambda x: contrastive_loss(x, 20), scores.requires_grad_())


class Reference:
    """What a term remembers and gives, with matrices and loops."""

    def __init__(self, term):
        self.layers = {name: getattr(term, name) for name in ("student", "teacher")}
        self.memory = {name: getattr(term, f"{name}_memory").double().numpy().copy() for name in self.layers}
        self.scale = {}

    def loss(self, features, index, chosen):
        embeddings = {}
        for name, layer in self.layers.items():
            weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
            vectors = features[name].double().numpy() @ weight.T + bias
            embeddings[name] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        total = 0.0
        for name, other in (("student", "teacher"), ("teacher", "student")):
            scores = [
                [math.exp(self.memory[other][k] @ embeddings[name][row] / 0.07) for k in (index[row], *chosen[row])]
                for row in range(len(index))
            ]
            self.scale.setdefault(other, np.mean(scores) * len(LABELS))
            total += loss_by_loop(np.array(scores) / self.scale[other], len(LABELS))
        for name, vectors in embeddings.items():
            for row, image in enumerate(index):
                mean = 0.5 * self.memory[name][image] + 0.5 * vectors[row]
                self.memory[name][image] = mean / np.linalg.norm(mean)
        return 0.8 * total


def step_of(student, teacher, index):
    batch = Batch(images=torch.zeros(len(index), 1, 2, 2), labels=LABELS[index], index=index)
    return SimpleNamespace(batch=batch, student_features={"s": student}, teacher_features={"t": teacher})


def test_three_steps_are_those_of_the_reference():
    torch.manual_seed(0)
    term = CrdTerm(CrdTerm.Parameters(**GIVEN), SHAPES)
    reference = Reference(term)
    for number in range(3):
        index = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(number))[:5]
        student, teacher = random_normal(number, 5, 3), random_normal(10 + number, 5, 5)
        torch.manual_seed(number)
        chosen = term.others.draw(index, 7)
        torch.manual_seed(number)
        expected = reference.loss({"student": student, "teacher": teacher}, index.tolist(), chosen.tolist())
        assert term(step_of(student, teacher, index)).item() == pytest.approx(expected, rel=1e-4)
    for name, memory in reference.memory.items():
        np.testing.assert_allclose(getattr(term, f"{name}_memory"), memory, atol=1e-5)


def test_both_layers_and_the_student_are_trained():
    torch.manual_seed(0)
    term = CrdTerm(CrdTerm.Parameters(**GIVEN), SHAPES)
    student = random_normal(0, 4, 3).requires_grad_()
    term(step_of(student, random_normal(1, 4, 5), torch.arange(4))).backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in (student, *term.parameters()))


def test_what_is_remembered_is_in_the_state_and_goes_on():
    torch.manual_seed(0)
    steps = [step_of(random_normal(n, 4, 3), random_normal(10 + n, 4, 5), torch.arange(n, n + 4)) for n in range(4)]
    term, other = (CrdTerm(CrdTerm.Parameters(**GIVEN), SHAPES) for _ in range(2))
    for step in steps[:2]:
        term(step)
    other.load_state_dict(term.state_dict())
    for step in steps[2:]:
        values = []
        for each in (term, other):
            torch.manual_seed(7)
            values.append(each(step).item())
        assert values[0] == values[1]


def test_images_of_other_classes_are_drawn_evenly():
    torch.manual_seed(0)
    index = torch.arange(len(LABELS))
    drawn = OtherClasses(LABELS).draw(index, 6000)
    for image in index.tolist():
        others = (LABELS[image] != LABELS).nonzero().flatten()
        counts = drawn[image].bincount(minlength=len(LABELS))
        assert counts.sum() == counts[others].sum() == 6000
        expected = 6000 / len(others)
        assert (counts[others] - expected).abs().max() < 5 * expected**0.5


def test_what_cannot_be_is_refused():
    with pytest.raises(ParameterError, match="all training images are of one class"):
        OtherClasses(torch.ones(5, dtype=torch.int64))
    two = CrdTerm.Parameters(**GIVEN | {"student_layers": ["s", "s"], "teacher_layers": ["t", "t"]})
    with pytest.raises(ParameterError, match="layers of 'crd': expected one of each network, got 2"):
        CrdTerm(two, SHAPES)
    shapes = FeatureShapes({"s": torch.Size([3, 2])}, SHAPES.teacher, LABELS)
    with pytest.raises(ParameterError, match=r"layers of 'crd', 's' to 't': the shapes \(3, 2\) and \(5,\) are no"):
        CrdTerm(CrdTerm.Parameters(**GIVEN), shapes)
