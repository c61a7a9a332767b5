"""The planes on which networks are drawn: through an image and two of its samples, or all of a plane of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.core.status import Status
from pipeline.images.pixels import pixels
from pipeline.images.prepared import Prepared
from pipeline.networks.classifier import Classifier
from pipeline.networks.fast import frozen
from pipeline.report.decision_map import (
    Scene,
    agreement_on,
    logits_on,
    map_png,
    plane_through,
    search_path,
    unit_square,
)
from pipeline.report.page import Picture, Row
from pipeline.report.samples import Example, image_of
from pipeline.search.find import find_boundary
from pipeline.shards.manifest import Manifest
from pipeline.shards.order import shards_by_view
from pipeline.shards.reader import BoundaryShards, samples_of

SCENES = 3
PATHS = 24  # of searches that are drawn, where inputs are points of a plane
POINTS_DRAWN = 1000


def is_planar(manifest: Manifest) -> bool:
    """Return whether images have two pixels, so that a plane holds all of them."""
    return int(np.prod(manifest.image_shape)) == 2


def maps_to_draw(models: Mapping[str, Classifier], manifest: Manifest) -> int:
    """Return how many decision maps there can be."""
    return len(models) * (1 if is_planar(manifest) else SCENES)


def decision_maps(
    scenes: Iterable[tuple[str, Scene]],
    models: Mapping[str, Classifier],
    names: Sequence[str],
    device: torch.device,
    progress: Callable[[], Any],
) -> Iterator[Row]:
    """Yield a row of pictures for each titled scene, one of each model.

    Args:
        scenes: with their titles.
        models: by name, the teacher first.
        names: of the classes.
        device: to run models on.
        progress: called after each picture.
    """
    teacher = next(iter(models))
    for title, scene in scenes:
        logits: dict[str, Any] = {}
        pictures = []
        for name, model in models.items():
            logits[name] = logits_on(frozen(model, device), scene.plane, device)
            png = map_png(scene, logits[name], names, None if name == teacher else logits[teacher])
            same = f", {agreement_on(logits[name], logits[teacher]):.1%} as the teacher" if name != teacher else ""
            pictures.append(Picture(png, name + same))
            progress()
        yield Row(title, pictures)


def scenes_of(
    shards: BoundaryShards, train: Prepared, teacher: Classifier, examples: Sequence[Example]
) -> Iterator[tuple[str, Scene]]:
    """Yield scenes with their titles.

    Args:
        shards: the dataset.
        train: the training split that it was made from.
        teacher: whose samples they are, on the CPU.
        examples: of the dataset, among which images are chosen.
    """
    teacher = teacher.eval()
    if is_planar(shards.manifest):
        yield "The whole input space", planar_scene(shards, train, teacher)
        return
    names = shards.manifest.class_names
    for example in examples[:: max(1, len(examples) // SCENES)][:SCENES]:
        found = _second_sample(teacher, example)
        if found is not None:
            second, target = found
            points = torch.stack([example.image, example.sample, second])
            plane = plane_through(*points)
            places = plane.coordinates(points)
            scene = Scene(plane, places[1:], [places[[0, 1]], places[[0, 2]]], places[:1], np.array([example.base]))
            yield f"{names[example.base]}, towards {names[example.target]} and {names[target]}", scene


def _second_sample(teacher: Classifier, example: Example) -> tuple[Tensor, int] | None:
    """Return another sample of an image, towards the likeliest class that has one, and that class."""
    base = torch.tensor([example.base])
    for target in example.logits.argsort(descending=True):
        if int(target) not in (example.base, example.target):
            found = find_boundary(teacher, example.image[None], base, target[None], quantise=True)
            if int(found.status[0]) == Status.CONVERGED:
                return example.image + found.perturbation[0], int(target)
    return None


def planar_scene(shards: BoundaryShards, train: Prepared, teacher: Classifier) -> Scene:
    """Return the points of view 0, their samples if any, and the paths of some of their searches, made again."""
    plane = unit_square(shards.manifest.image_shape)
    count = min(POINTS_DRAWN, sum(shard.rows for shard in shards_by_view(shards.manifest)[0]))
    rows = [shards[number] for number in range(count)]
    images = torch.stack([image_of(row, train, shards.manifest) for row in rows])
    labels = torch.stack([row["label"] for row in rows])
    points = plane.coordinates(pixels(images))
    if not shards.manifest.targets:
        return Scene(plane, points[:0], [], points, labels.numpy())
    columns = {
        name: torch.stack([row[name][0] for row in rows]) for name in ("delta", "delta_scale", "target", "status")
    }
    samples = samples_of(images, columns["delta"], columns["delta_scale"])
    (done,) = torch.nonzero(columns["status"] == Status.CONVERGED, as_tuple=True)
    paths = [
        search_path(teacher, pixels(images[row]), int(labels[row]), int(columns["target"][row]))
        for row in done[:: max(1, len(done) // PATHS)].tolist()
    ]
    return Scene(
        plane,
        plane.coordinates(samples[done]),
        [plane.coordinates(path) for path in paths],
        points,
        labels.numpy(),
    )


def maps_note(manifest: Manifest) -> str:
    """Return what the marks on decision maps are."""
    lines = (
        "Colours are the classes that a network predicts; thin lines are logit margins of 1, 2, 4 and 8, thick ones "
        "decision boundaries, dashed ones those of the teacher."
    )
    if is_planar(manifest):
        return (
            f"{lines} Diamonds are boundary-supporting samples of the teacher; on its map, dots are training images "
            "and lines the paths of some searches. Students are those of seed 0."
        )
    return (
        f"The plane through an image (circle) and two of its samples (diamonds; the second one was searched for this "
        f"picture). {lines} Students are those of seed 0. Points outside [0, 1] are not clipped."
    )
