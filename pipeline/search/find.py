"""The boundary search for any classifier, without parameters, files or datasets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipeline.networks.outputs import probability_problem, random_problem
from pipeline.search.boundary import (
    TOLERANCE,
    LogitsFunction,
    Problem,
    SearchResult,
    check_images,
    logits_in_batches,
)
from pipeline.search.geometry import MOST_LEVELS
from pipeline.search.newton import NewtonSearch


@torch.inference_mode(False)
@torch.no_grad()
def find_boundary(
    model: nn.Module | LogitsFunction,
    images: Tensor,
    base: Tensor | None = None,
    target: Tensor | None = None,
    *,
    tolerance: float = TOLERANCE,
    max_gradients: int = 20,
    batch_size: int = 256,
    quantise: bool = False,
) -> SearchResult:
    """Find a sample near each image on the decision boundary between two classes of a model.

    The sample is `images + result.perturbation`; it is on the boundary where `result.status` is `Status.CONVERGED`.
    A module is asked in evaluation mode and without autocast, and left in the mode it was in; its weights get no
    gradients.

    Args:
        model: from pixels (n, C, H, W) in [0, 1] to logits (n, classes), differentiable; it normalises by itself.
        images: (N, C, H, W) float32 in [0, 1], on the model's device.
        base: (N,) int64; by default the classes that the model predicts. Where it predicts another class, nothing is
            sought, and the status is `Status.BASE_MISCLASSIFIED`.
        target: (N,) int64, the classes on the other side; by default the best one but the base class.
        tolerance: the largest probability margin tanh(|m| / 2) of a converged sample, m being the logit margin.
        max_gradients: gradient evaluations for each image.
        batch_size: images per pass.
        quantise: round perturbations to 8 bits, as shards store them.

    Raises:
        ValueError: the arguments do not fit each other, images are outside [0, 1], or the model gives no logits, no
            gradients, or something else each time.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[4.0, 0.0], [-4.0, 0.0]]))
        >>> _ = model[1].bias.data.copy_(torch.tensor([-2.0, 2.0]))  # the boundary is where the first pixel is 0.5
        >>> found = find_boundary(model, torch.tensor([[[[0.9, 0.4]]]]))
        >>> found.status, found.perturbation.flatten()
        (tensor([0], dtype=torch.uint8), tensor([-0.4000,  0.0000]))
    """
    check_images(images)
    if images.element_size() < torch.float32.itemsize:
        raise ValueError(
            f"expected images in float32, got {images.dtype}, in which perturbations are lost: let the model itself "
            "cast, as lambda x: model(x.half()).float()"
        )
    images = images.clone() if images.is_inference() else images  # gradients go through no tensor of that mode
    for name, classes in (("base", base), ("target", target)):
        if classes is not None and classes.shape != (len(images),):
            raise ValueError(f"expected {name} ({len(images)},), got {tuple(classes.shape)}")
    base, target = (each if each is None else each.clone() for each in (base, target))
    with _evaluated(model), torch.autocast(images.device.type, enabled=False):
        if len(images):
            _check_model(model, images[:1])
        logits = logits_in_batches(model, images, batch_size)
        if len(images) and (problem := probability_problem(logits)):
            raise ValueError(f"the model {problem}")
        for name, classes in (("base", base), ("target", target)):
            _check_classes(name, classes, logits.shape[1])
        base = logits.argmax(1) if base is None else base
        target = logits.scatter(1, base[:, None], -torch.inf).argmax(1) if target is None else target
        return NewtonSearch(max_gradients=max_gradients)(
            Problem(
                images=images,
                base=base,
                target=target,
                logits=logits,
                reference=model,
                fast=model,
                tolerance=tolerance,
                batch_size=batch_size,
                levels=MOST_LEVELS if quantise else None,
            )
        )


def _check_model(model: LogitsFunction, image: Tensor) -> None:
    """Refuse a model that gives no logits (1, classes) of an image (1, C, H, W), or none that gradients go through."""
    with torch.enable_grad():
        logits = model(image.detach().clone().requires_grad_())
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the model gives {type(logits).__name__}, expected logits: wrap it, as lambda x: model(x).logits"
        )
    if logits.ndim != 2 or len(logits) != 1 or logits.shape[1] < 2:
        raise ValueError(f"the model gives {tuple(logits.shape)} for one image, expected logits (1, classes)")
    if logits.dtype != image.dtype:
        raise ValueError(f"the model gives {logits.dtype}, expected {image.dtype}, as images: return logits.float()")
    if not logits.requires_grad:
        raise ValueError("no gradients go through the model: leave out torch.no_grad, detach and the like in it")
    if problem := random_problem(logits.detach(), model(image)):
        raise ValueError(f"the model {problem}")


def _check_classes(name: str, classes: Tensor | None, count: int) -> None:
    """Refuse classes (N,) that a model does not have: on a GPU, they would end the process."""
    if classes is None or not len(classes):
        return
    lowest, largest = int(classes.min()), int(classes.max())
    if lowest < 0 or largest >= count:
        raise ValueError(f"expected {name} from 0 to {count - 1}, the model's classes, got {lowest} to {largest}")


@contextlib.contextmanager
def _evaluated(model: nn.Module | LogitsFunction) -> Iterator[None]:
    """Let a module be in evaluation mode for a while."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
