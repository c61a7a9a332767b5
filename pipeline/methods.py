"""The methods of distillation: one loss each, of a student and a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.batches import Batch
from pipeline.config import Distillation
from pipeline.losses import (
    boundary_weight,
    hinton_weight,
    mean_over_selected,
    select_base_samples,
    softened_cross_entropy,
)

Loss = Callable[[nn.Module, Batch, Distillation, float], Tensor]
"""(student, batch, weights, progress e / E in [0, 1)) to a scalar."""


def original(student: nn.Module, batch: Batch, weights: Distillation, progress: float) -> Tensor:
    """Cross-entropy with the labels; no teacher."""
    return F.cross_entropy(student(batch.images), batch.labels)


def hinton(student: nn.Module, batch: Batch, weights: Distillation, progress: float) -> Tensor:
    """Labels and softened teacher outputs (Hinton et al., 2015)."""
    return _hinton(student(batch.images), batch, weights, progress)


def bss(student: nn.Module, batch: Batch, weights: Distillation, progress: float) -> Tensor:
    """Hinton's loss, and the same distillation on boundary-supporting samples (Heo et al., 2019)."""
    logits = student(batch.images)
    loss = _hinton(logits, batch, weights, progress)
    beta = boundary_weight(progress, weights.boundary_start, weights.boundary_zero_at)
    if beta == 0:
        return loss
    assert batch.teacher_logits is not None
    assert batch.usable is not None
    assert batch.boundary is not None
    count = max(1, int(weights.boundary_fraction * len(batch.labels)))
    chosen = select_base_samples(logits.detach(), batch.teacher_logits, batch.labels, batch.usable, count)
    found = batch.boundary(chosen.rows)
    with nullcontext() if weights.boundary_moves_statistics else running_statistics_kept(student):
        losses = softened_cross_entropy(student(found.samples), found.teacher_logits, weights.temperature)
    return loss + beta * mean_over_selected(losses, chosen.weights * found.usable)


LOSSES: dict[str, Loss] = {"original": original, "hinton": hinton, "bss": bss}


def _hinton(logits: Tensor, batch: Batch, weights: Distillation, progress: float) -> Tensor:
    assert batch.teacher_logits is not None
    alpha = hinton_weight(progress, weights.hinton_start, weights.hinton_end)
    distilled = softened_cross_entropy(logits, batch.teacher_logits, weights.temperature).mean()
    return F.cross_entropy(logits, batch.labels) + alpha * distilled


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch norm still normalises by the batch in training, but its running statistics do not move."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
