"""From a trained teacher and a block of images to the columns of a shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.boundary import SearchResult, logits_in_batches
from pipeline.config import Attack, Dataset
from pipeline.data import Prepared
from pipeline.deepfool import deepfool
from pipeline.heo2019 import heo2019
from pipeline.models import Classifier, folded, halved, placed
from pipeline.newton import newton
from pipeline.one_step import one_step
from pipeline.runtime import one_cpu_thread
from pipeline.status import Status
from pipeline.views import Stream, apply_views, draw_views, uniforms


class Block(NamedTuple):
    """A contiguous block of the training split under one view: the content of one shard."""

    view: int
    number: int
    start: int
    rows: int


class Search:
    """The boundary search of one teacher, ready to make the values of shards.

    Args:
        teacher: the reference network, whose logits are recorded.
        attack, dataset: parameters.
        device: where to search.
        batch_size: samples per pass.
    """

    def __init__(
        self, teacher: Classifier, attack: Attack, dataset: Dataset, device: torch.device, batch_size: int
    ) -> None:
        self.teacher = placed(teacher, device).eval().requires_grad_(False)
        self.attack, self.dataset, self.device, self.batch_size = attack, dataset, device, batch_size
        # Gradients come from a faster copy of the network; what is recorded comes from the network itself. The searches
        # that are here for comparison get them in float32.
        self.fast = halved(folded(self.teacher)) if attack.search == "newton" else folded(self.teacher)

    @one_cpu_thread()
    @torch.no_grad()
    def shard_values(self, train: Prepared, block: Block) -> dict[str, NDArray[Any]]:
        """All columns of one shard, whose bytes do not depend on the number of CPU threads."""
        attack, dataset = self.attack, self.dataset
        rows = slice(block.start, block.start + block.rows)
        drawn = draw_views(attack.seed, block.view, block.start, block.rows, dataset.padding, dataset.flip)
        views = apply_views(
            torch.from_numpy(train.images[rows]),
            torch.from_numpy(drawn.crop),
            torch.from_numpy(drawn.flip),
            dataset.padding,
        )
        labels = train.labels[rows]
        images = views.to(self.device).float() / 255
        logits = logits_in_batches(self.teacher, images, self.batch_size).cpu().numpy()
        noise = uniforms(attack.seed, Stream.TARGETS, block.view, block.start, block.rows, logits.shape[1])
        target = draw_targets(logits, labels, noise, attack.targets)
        correct = logits.argmax(1) == labels

        values: dict[str, NDArray[Any]] = {
            "index": np.arange(rows.start, rows.stop, dtype=np.uint32),
            "label": labels,
            "image": views.numpy(),
            "crop": drawn.crop,
            "flip": drawn.flip,
            "teacher_logits": logits,
            "target": np.where(correct[:, None], target, -1).astype(np.int16),
            "delta": np.zeros((block.rows, attack.targets, *train.image_shape), np.int8),
            "delta_scale": np.zeros((block.rows, attack.targets), np.float32),
            "boundary_logits": np.repeat(logits[:, None], attack.targets, 1),
            "margin": np.zeros((block.rows, attack.targets), np.float32),
            "distance": np.zeros((block.rows, attack.targets), np.float32),
            "status": np.full((block.rows, attack.targets), Status.BASE_MISCLASSIFIED, np.uint8),
            "evaluations": np.zeros((block.rows, attack.targets), np.uint16),
        }
        if correct.any():
            draw = (attack.seed, block.view, block.start)
            self._search_into(values, images, torch.from_numpy(logits), correct, draw)
        if not attack.embed_images:
            del values["image"]
        return values

    def _search_into(
        self,
        values: dict[str, NDArray[Any]],
        images: Tensor,
        logits: Tensor,
        correct: NDArray[np.bool_],
        draw: Sequence[int],
    ) -> None:
        """Fill in what a search finds for the rows that the teacher classifies correctly, all targets at once."""
        base = torch.from_numpy(values["label"][correct]).to(self.device)
        target = torch.from_numpy(values["target"][correct].astype(np.int64)).to(self.device)
        count, classes = target.shape[1], self.teacher.architecture.classes
        result = self.find(
            images[torch.from_numpy(correct).to(self.device)].repeat_interleave(count, 0),
            base.repeat_interleave(count),
            target.flatten(),
            logits[torch.from_numpy(correct)].to(self.device).repeat_interleave(count, 0),
            draw,
        )
        found = {
            "target": result.target,
            "delta": result.direction,
            "delta_scale": result.scale,
            "boundary_logits": result.logits,
            "margin": result.margin,
            "distance": result.distance,
            "status": result.status,
            "evaluations": result.gradients,
        }
        for name, tensor in found.items():
            array = tensor.cpu().numpy()
            values[name][correct] = array.reshape(-1, count, *array.shape[1:])
        # The search's network may see a tie where the reference sees a correct base: by rounding, very rarely.
        lost = values["status"] == Status.BASE_MISCLASSIFIED
        values["target"][lost] = -1
        values["margin"][lost] = 0
        values["boundary_logits"][lost] = np.broadcast_to(values["teacher_logits"][:, None], (*lost.shape, classes))[
            lost
        ]

    def find(
        self, images: Tensor, base: Tensor, target: Tensor, logits: Tensor, draw: Sequence[int] = ()
    ) -> SearchResult:
        """Search as the parameters say.

        Args:
            images, base, target, logits: as in `pipeline.newton.newton`; logits are the teacher's.
            draw: what random noise follows from, in a search that is none.
        """
        attack = self.attack
        arguments = (self.fast, images, base, target)
        options: dict[str, Any] = {
            "tolerance": attack.tolerance,
            "batch_size": self.batch_size,
            "reference": self.teacher,
        }
        if attack.search in ("heo2019", "heo2019_probabilities"):
            options |= {"mean": self.teacher.mean, "std": self.teacher.std}
            return heo2019(*arguments, probabilities=attack.search == "heo2019_probabilities", **options)
        if attack.search == "deepfool":
            return deepfool(*arguments, **options)
        options |= {"max_gradients": attack.max_gradients, "logits": logits}
        if attack.search == "newton":
            return newton(*arguments, **options)
        direction: Literal["fgsm", "random"] = "fgsm" if attack.search == "fgsm" else "random"
        return one_step(*arguments, direction=direction, draw=draw, **options)


def draw_targets(
    logits: NDArray[np.float32], labels: NDArray[np.int64], noise: NDArray[np.float64], targets: int
) -> NDArray[np.int64]:
    """Draw distinct target classes, with probability proportional to the teacher's softmax without the base class.

    Gumbel top-k (Kool et al., 2019) over the logits, in float64: 1 - q_b, by which a confident teacher's
    probabilities would be divided, underflows.

    Args:
        logits: (N, classes).
        labels: (N,), base classes.
        noise: (N, classes), uniform on [0, 1).
        targets: how many, at most classes - 1.

    Returns:
        (N, targets), in order of the draw.
    """
    inside = np.clip(noise, 2.0**-54, 1 - 2.0**-53)  # the logarithms of 0 and 1 are not wanted
    keys = logits.astype(np.float64) - np.log(-np.log(inside))
    keys = np.maximum(keys, np.finfo(np.float64).min)  # a class of probability 0 still comes before the base class
    np.put_along_axis(keys, labels[:, None], -np.inf, 1)
    return np.argsort(-keys, axis=1, kind="stable")[:, :targets]
