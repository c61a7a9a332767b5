"""The teacher is asked again: does it say of some rows of a sample dataset what the dataset stores?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.errors import ShardError, WeightsError
from pipeline.core.files import file_digest
from pipeline.core.status import Status
from pipeline.images.pixels import pixels
from pipeline.images.prepared import Prepared
from pipeline.networks.classifier import Classifier
from pipeline.networks.fast import frozen
from pipeline.networks.penultimate import penultimate_features
from pipeline.networks.predict import rows_of_a_batch
from pipeline.networks.weights import load_weights
from pipeline.search.boundary import judge, logits_in_batches, margin_of, probability_margin
from pipeline.shards.check import are_crops, tolerance_of
from pipeline.shards.manifest import Manifest
from pipeline.shards.reader import BoundaryShards, check_train, samples_of, views_again

ROUNDING = 1e-3  # of 1 and an image's largest logit; other float32 arithmetic differs by 6e-6 of it (docs/SHARING.md)
HALF_ROUNDING = 2.0**-11  # of a number that is stored in float16


@dataclass
class TeacherCheck:
    """What came out of asking a teacher again."""

    rows: int = 0
    """About which it was asked."""
    shards: int = 0
    """In which these rows are."""
    samples: int = 0
    kept: int = 0
    """Samples whose status is what the teacher's logits now give, without any allowance for rounding."""
    logits: float = 0.0
    """Largest difference, of views and of samples."""
    margin: float = 0.0
    """Largest difference, of samples."""
    problems: list[str] = field(default_factory=list)
    """A sentence for each shard with rows that differ by more than rounding."""

    def add(self, compared: _Compared) -> None:
        """Count some rows."""
        largest = {name: float(difference.max()) for name, (difference, _) in compared.differences.items()}
        self.logits = max(self.logits, largest["teacher_logits"], largest.get("boundary_logits", 0))
        self.margin = max(self.margin, largest.get("margin", 0))
        self.samples, self.kept = self.samples + compared.kept.numel(), self.kept + int(compared.kept.sum())


def teacher_of(path: Path, shards: BoundaryShards) -> Classifier:
    """Read the teacher that a sample dataset names.

    Raises:
        WeightsError: the file is missing or unusable, has another digest, or is for other images or classes.
    """
    manifest = shards.manifest
    if path.is_file() and (digest := file_digest(path)) != manifest.digests.teacher:
        raise WeightsError(
            f"{path}: not the teacher of the samples in {shards.directory}: its sha256 begins with {digest[:16]}, that "
            f"of their teacher with {manifest.digests.teacher[:16]}: take the file that they were made with"
        )
    model = load_weights(path)
    architecture, classes = model.architecture, len(manifest.class_names)
    if (architecture.classes, architecture.image_shape) != (classes, manifest.image_shape):
        raise WeightsError(
            f"{path}: a teacher for images {architecture.image_shape} of {architecture.classes} classes, the samples "
            f"in {shards.directory} are {manifest.image_shape} of {classes}"
        )
    return model


def draw_rows(total: int, count: int, seed: int) -> NDArray[np.int64]:
    """Draw rows at random, each with the same probability: one from each of so many parts of one size or nearly so.

    Returns:
        (count,) int64 in rising order; all `total` rows where there are no more.

    Example:
        >>> draw_rows(100, 5, seed=0).tolist()
        [4, 24, 60, 76, 89]
    """
    count, generator = min(count, total), np.random.default_rng(seed)
    edges = np.arange(count + 1) * total // count
    rows = edges[:-1] + np.floor(generator.random(count) * np.diff(edges)).astype(np.int64)
    return np.sort((rows + generator.integers(total)) % total)


@torch.no_grad()
def check_teacher(
    shards: BoundaryShards,
    teacher: Classifier,
    train: Prepared | None,
    rows: NDArray[np.int64],
    device: torch.device,
    progress: Callable[[int], object],
) -> TeacherCheck:
    """Compare what a dataset stores of some rows with what its teacher says of them now; nothing else is read.

    Compared are the logits of views and samples, the teacher's features, the margins, and whether each status can be.
    A difference of logits or features passes up to `ROUNDING` times the largest of an image and 1.

    Args:
        shards: the dataset.
        teacher: of the dataset.
        train: the prepared training split, needed where images are not embedded.
        rows: (n,) of the dataset, in rising order.
        device: where to compute.
        progress: is told how many more rows are done.

    Raises:
        ShardError: a shard cannot be read, or holds what is not possible; the training split is needed and is not that
            of the dataset.
    """
    manifest, network, found = shards.manifest, frozen(teacher, device), TeacherCheck(rows=len(rows))
    if "image" not in manifest.columns:
        check_train(shards.directory, manifest, train)
    asked, wrong = set[str](), dict[str, list[str]]()
    step = rows_of_a_batch(manifest.image_shape)
    for start in range(0, len(rows), step):
        some = rows[start : start + step].tolist()
        items = shards.__getitems__(some)
        columns = {name: torch.stack([item[name] for item in items]) for name in manifest.columns}
        places = [(shard.name, number) for shard, number in map(shards.place, some)]
        for place, sound in zip(places, _are_possible(columns, manifest, train), strict=True):
            if not sound:
                raise ShardError(f"{shards.directory}/{place[0]}: row {place[1]} holds values that are not possible")
        if train is not None and "image" not in columns:
            images = torch.from_numpy(train.images[columns["index"].numpy()])
            columns["image"] = views_again(images, columns, manifest)
        compared = _compared(network, columns, tolerance_of(manifest), step)
        found.add(compared)
        asked.update(name for name, _ in places)
        for (name, number), problem in zip(places, compared.problems(), strict=True):
            if problem is not None:
                wrong.setdefault(name, []).append(f"row {number}: {problem}")
        progress(len(some))
    found.shards = len(asked)
    for name, problems in wrong.items():
        more = f"; so do {len(problems) - 1} more of the rows drawn" if len(problems) > 1 else ""
        found.problems.append(f"{shards.directory}/{name}: {problems[0]}{more}")
    return found


def _are_possible(columns: dict[str, Tensor], manifest: Manifest, train: Prepared | None) -> list[bool]:
    """Return of each row whether its numbers name classes, statuses and images that there are."""
    classes = len(manifest.class_names)
    limits = {"label": (0, classes), "target": (-1, classes), "status": (0, len(Status))}
    if train is not None:
        limits["index"] = (0, len(train.labels))
    sound = torch.from_numpy(are_crops(columns["crop"].numpy(), manifest))
    for name, (first, end) in limits.items():
        if name in columns:
            values = columns[name].view(len(sound), -1)
            sound &= ((values >= first) & (values < end)).all(1)
    return [bool(each) for each in sound]


class _Compared(NamedTuple):
    """Stored columns of n rows with K samples each, beside what the teacher says now."""

    differences: dict[str, tuple[Tensor, Tensor]]
    """By column: the difference (n,), and what would pass as rounding (n,)."""
    kept: Tensor
    """(n, K): the status is what comes out now."""
    possible: Tensor
    """(n, K): it is, but for rounding."""

    def problems(self) -> Iterator[str | None]:
        """Return the first problem of each row, None of a row without any."""
        return map(self._problem, range(len(self.possible)))

    def _problem(self, row: int) -> str | None:
        for name, (difference, allowed) in self.differences.items():
            if not difference[row] <= allowed[row]:
                size, most = f"{difference[row]:.3g}", f"{allowed[row]:.2g}"
                return f"column '{name}' differs by {size} from what the teacher says (rounding: up to {most})"
        return None if self.possible[row].all() else "column 'status' differs from what the teacher's logits give"


def _compared(network: Classifier, columns: dict[str, Tensor], tolerance: float, batch_size: int) -> _Compared:
    """Ask the teacher about rows, and compare."""
    device, images = network.mean.device, columns["image"]
    with ExitStack() as stack:
        given = stack.enter_context(penultimate_features(network)) if "teacher_features" in columns else []
        views = logits_in_batches(network, pixels(images.to(device)), batch_size).cpu()
    differences = {"teacher_logits": _difference(columns["teacher_logits"], views, _rounding(views))}
    if given:
        features = torch.cat(given).cpu()
        differences["teacher_features"] = _difference(columns["teacher_features"], features, _rounding(features))
    if "delta" not in columns:
        return _Compared(differences, *torch.ones(2, len(images), 0, dtype=torch.bool))
    samples = samples_of(images[:, None], columns["delta"], columns["delta_scale"])
    logits = logits_in_batches(network, samples.flatten(0, 1).to(device), batch_size).cpu()
    logits = logits.view_as(columns["boundary_logits"])
    margin, kept, possible = _judged(columns, views, logits, tolerance)
    # A bad gradient may leave what is not finite.
    left = (columns["status"] == Status.BAD_GRADIENT) & ~columns["boundary_logits"].isfinite().all(-1)
    for name, now, most in (
        ("boundary_logits", logits, _rounding(logits)),
        ("margin", margin, 2 * _rounding(logits).squeeze(-1)),
    ):
        ignored = left.view(*left.shape, *[1] * (now.ndim - 2))
        stored, now = (each.masked_fill(ignored, 0) for each in (columns[name], now))
        differences[name] = _difference(stored, now, most.nan_to_num(0, 0))
    return _Compared(differences, kept, possible)


def _rounding(now: Tensor) -> Tensor:
    """Return by how much numbers (..., n) of the teacher may differ elsewhere: (..., 1)."""
    return ROUNDING * (1 + now.abs().amax(-1, keepdim=True))


def _difference(stored: Tensor, now: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the difference (n,) of each row where most of what is allowed is used up, and what is allowed there."""
    if stored.dtype == torch.float16:
        allowed = allowed + HALF_ROUNDING * now.abs()
    difference = (stored.float() - now).abs().nan_to_num(torch.inf).flatten(1)
    allowed = allowed.expand(now.shape).flatten(1)
    worst = (difference / allowed).argmax(1, keepdim=True)
    return difference.gather(1, worst).squeeze(1), allowed.gather(1, worst).squeeze(1)


def _judged(
    columns: dict[str, Tensor], views: Tensor, logits: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Judge samples by what the teacher says now.

    Args:
        columns: of n rows with K samples each.
        views: (n, classes), logits of the views.
        logits: (n, K, classes), of the samples.
        tolerance: largest probability margin of a converged sample.

    Returns:
        margins (n, K), 0 where nothing was searched; whether the status is what comes out now (n, K); whether it is,
        but for rounding (n, K).
    """
    label, target, status = columns["label"][:, None], columns["target"].long(), columns["status"].long()
    searched = target >= 0
    lead = views.gather(1, label) - views.scatter(1, label, -torch.inf).amax(1, keepdim=True)  # (n, 1)
    base, other = label.expand_as(target), torch.where(searched, target, (label + 1) % views.shape[1])
    of_samples = logits.flatten(0, 1), base.flatten(), other.flatten()
    judged = judge(*of_samples, tolerance).view_as(target)
    margin = margin_of(*of_samples).view_as(target)
    pair = torch.stack([base, other], -1)
    third = logits.scatter(-1, pair, -torch.inf).amax(-1) - logits.gather(-1, pair).amin(-1)  # above 0: it is on top
    kept = torch.where(searched, (lead > 0) & (judged == status), lead <= 0)

    slack, slack_of_view = 2 * _rounding(logits).squeeze(-1), 2 * _rounding(views)
    off = probability_margin(margin) - tolerance
    near = off <= slack / 2  # tanh(m / 2) grows half as fast as m
    may_be = {
        Status.CONVERGED: near & (third <= slack),
        Status.BASE_MISCLASSIFIED: ~searched & (lead <= slack_of_view),
        Status.NOT_CONVERGED: off >= -slack / 2,
        Status.THIRD_CLASS: near & (third >= -slack),
        Status.BAD_GRADIENT: torch.ones_like(searched),
    }
    possible = torch.stack([may_be[each] for each in Status], -1).gather(-1, status[..., None]).squeeze(-1)
    ended = status == Status.BAD_GRADIENT  # where it was, whatever the logits are there
    possible &= ~searched | (lead >= -slack_of_view)
    return torch.where(searched, margin, 0), kept | ended, possible
