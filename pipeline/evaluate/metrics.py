"""MagSim and AngSim as metrics of torchmetrics, which accumulate over batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from pipeline.evaluate.similarity import angle_similarity, magnitude_similarity


class _MeanSimilarity(Metric):
    """The mean of a similarity over all pairs for which it is defined; `left_out` counts the others."""

    full_state_update = False
    higher_is_better = True
    total: Tensor
    count: Tensor
    left_out: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("left_out", torch.tensor(0), dist_reduce_fx="sum")

    def _similarity(self, preds: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add pairs of perturbations, both (N, ...)."""
        values = self._similarity(preds, target)
        defined = torch.isfinite(values)
        self.total += values[defined].sum()
        self.count += defined.sum()
        self.left_out += (~defined).sum()

    def compute(self) -> Tensor:
        """Return the mean, NaN without pairs."""
        return self.total / self.count


class MagSim(_MeanSimilarity):
    """MagSim over batches of pairs: see `mag_sim`."""

    def _similarity(self, preds: Tensor, target: Tensor) -> Tensor:
        return magnitude_similarity(preds, target)


class AngSim(_MeanSimilarity):
    """AngSim over batches of pairs: see `ang_sim`."""

    def _similarity(self, preds: Tensor, target: Tensor) -> Tensor:
        return angle_similarity(preds, target)
