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
    "probabilities": (lambda logits: logits.softmax(1), "gives probabilities, expected logits: leave out its softmax"),
    "random logits": (lambda logits: logits + torch.randn_like(logits), "gives other logits each time"),
    "logits of half precision": (lambda logits: logits.half(), r"gives torch\.float16, .*: return logits\.float\(\)"),
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


def test_probabilities_that_are_made_logits_are_searched():
    model, images = tiny_resnet(0), random_images(0, 6)
    found = find_boundary(lambda x: model(x).log_softmax(1), images)
    logits = model(images + found.perturbation).topk(2).values
    assert (found.status == Status.CONVERGED).all()
    assert ((logits[:, 0] - logits[:, 1]) / 2).tanh().max() <= 0.0201


def test_autocast_of_the_caller_changes_nothing():
    model, images = tiny_resnet(0), random_images(3, 6)
    expected = find_boundary(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        found = find_boundary(model, images)
        assert model(images).dtype == torch.bfloat16
    assert torch.equal(found.perturbation, expected.perturbation)
    assert torch.equal(found.boundary_logits, expected.boundary_logits)


def test_a_model_that_computes_in_half_precision_by_itself_is_searched():
    model, images = tiny_resnet(0).bfloat16(), random_images(3, 6)
    with pytest.raises(ValueError, match=r"expected images in float32, got torch\.bfloat16"):
        find_boundary(model, images.bfloat16())
    found = find_boundary(lambda x: model(x.bfloat16()).float(), images)
    assert found.boundary_logits.dtype == torch.float32
    assert (found.distance > 0).all()


@pytest.mark.parametrize("name", ["base", "target"])
@pytest.mark.parametrize("wrong", [-1, 4, 1000])
def test_classes_that_the_model_does_not_have_are_refused(name, wrong):
    model, images = tiny_resnet(0), random_images(0, 3)
    classes = torch.tensor([0, 1, wrong])
    span = f"{min(0, wrong)} to {max(1, wrong)}"
    with pytest.raises(ValueError, match=f"expected {name} from 0 to 3, the model's classes, got {span}"):
        find_boundary(model, images, **{name: classes})


def test_images_that_rounding_brought_outside_are_told_with_all_digits():
    images = random_images(0, 3)
    images[0, 0, 0, 0] = 1 + 2**-23
    with pytest.raises(ValueError, match=r"to 1\.00000012: .*clamp what rounding brought outside"):
        find_boundary(tiny_resnet(0), images)
    found = find_boundary(tiny_resnet(0), images.clamp(0, 1))
    assert len(found.status) == 3
