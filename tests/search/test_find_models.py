"""Models of others, as `find_boundary` is given them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipeline.core.status import Status
from pipeline.search.find import find_boundary
from tests.support.helpers import random_images, tiny_resnet


class Returning(nn.Module):
    """A network whose output is packed somehow."""

    def __init__(self, pack):
        super().__init__()
        self.inner, self.pack = tiny_resnet(0), pack

    def forward(self, images):
        return self.pack(self.inner(images))


REFUSED = {
    "a dict": (lambda logits: {"logits": logits}, "gives dict, expected logits: wrap it"),
    "an object": (lambda logits: SimpleNamespace(logits=logits), "gives SimpleNamespace, expected logits"),
    "logits and auxiliary ones": (lambda logits: (logits, logits), "gives tuple, expected logits"),
    "maps": (lambda logits: logits[:, :, None, None], r"gives \(1, 4, 1, 1\) for one image"),
    "one class": (lambda logits: logits[:, :1], r"gives \(1, 1\) for one image"),
    "predictions": (lambda logits: logits.argmax(1), r"gives \(1,\) for one image"),
    "detached logits": (lambda logits: logits.detach(), "no gradients go through the model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_gives_no_logits_or_no_gradients_is_refused_by_what_it_gives(kind):
    pack, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        find_boundary(Returning(pack), random_images(0, 3))


def test_a_wrapped_model_works():
    model, images = Returning(lambda logits: {"logits": logits}), random_images(0, 6)
    found = find_boundary(lambda x: model(x)["logits"], images)
    expected = find_boundary(tiny_resnet(0), images)
    assert torch.equal(found.perturbation, expected.perturbation)
    assert (found.status == Status.CONVERGED).any()


def test_a_model_in_training_mode_is_searched_in_evaluation_mode_and_stays_as_it_was():
    model = tiny_resnet(0).requires_grad_(True).train()
    model.network.bn1.eval()  # one layer that its owner keeps so
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images = random_images(1, 8)
    found = find_boundary(model, images)
    expected = find_boundary(tiny_resnet(0), images)
    assert torch.equal(found.perturbation, expected.perturbation)
    assert model.training
    assert not model.network.bn1.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(each.requires_grad and each.grad is None for each in model.parameters())


def test_gradients_are_had_where_the_caller_has_switched_them_off():
    model, images = tiny_resnet(0), random_images(2, 6)
    expected = find_boundary(model, images)
    with torch.no_grad():
        assert torch.equal(find_boundary(model, images).perturbation, expected.perturbation)
    with torch.inference_mode():
        found = find_boundary(model, random_images(2, 6))
    assert torch.equal(found.perturbation, expected.perturbation)
