"""Decision maps: what networks say on a plane through pixel space, as pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.boundary import LogitsFunction, logits_in_batches
from pipeline.newton import newton

POINTS, REFINEMENT = 61, 6  # along each side: where networks are asked, and pixels between two of them
MARGIN_AROUND = 0.6  # of the distance between the points that a plane was laid through
LEVELS = (1, 2, 4, 8)  # logit margins that are drawn as contours
SMALLEST_LABEL = 0.015  # of the map, for a region's class to be written into it
INCHES, DOTS_PER_INCH = 3.0, 200
INK, PAPER = "#16181d", "#ffffff"


class Plane(NamedTuple):
    """A square of a plane in pixel space: `origin + a * across + b * up`."""

    origin: Tensor
    """(C, H, W)."""
    across: Tensor
    """(C, H, W), of length 1."""
    up: Tensor
    """(C, H, W), of length 1, orthogonal to `across`."""
    left: float
    bottom: float
    side: float
    """Its length, L2 in pixel space."""

    def points(self, number: int) -> Tensor:
        """(number * number, C, H, W): row by row from the bottom, on all of the square; not clipped to [0, 1]."""
        steps = torch.linspace(0, self.side, number)
        b, a = torch.meshgrid(self.bottom + steps, self.left + steps, indexing="ij")
        shape = (-1, *[1] * self.origin.ndim)
        return self.origin + a.reshape(shape) * self.across + b.reshape(shape) * self.up

    def coordinates(self, images: Tensor) -> NDArray[np.float64]:
        """(N, 2): where images (N, C, H, W) are, or their projections on the plane."""
        offsets = (images - self.origin).flatten(1).double()
        axes = torch.stack([self.across.flatten(), self.up.flatten()], 1).double()
        return (offsets @ axes).numpy()


def plane_through(image: Tensor, first: Tensor, second: Tensor) -> Plane:
    """The plane through three points (C, H, W); if they lie on a line, through that line and an arbitrary direction."""
    across = F.normalize((first - image).flatten().double(), dim=0)
    arbitrary = torch.randn(across.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    up = next(
        rest
        for direction in ((second - image).flatten().double(), arbitrary)
        if (rest := direction - direction.dot(across) * across).norm() > 1e-3 * direction.norm() > 0
    )
    up = F.normalize(up, dim=0)
    shape = image.shape
    plane = Plane(image, across.view(shape).float(), up.view(shape).float(), 0, 0, 0)
    places = plane.coordinates(torch.stack([image, first, second]))
    low, high = places.min(0), places.max(0)
    side = float((high - low).max()) * (1 + 2 * MARGIN_AROUND)
    left, bottom = ((low + high) / 2 - side / 2).tolist()
    return plane._replace(left=left, bottom=bottom, side=side)


def unit_square(shape: Sequence[int]) -> Plane:
    """All images of two pixels, of shape (C, H, W): the first pixel to the right, the second one up."""
    across, up = torch.eye(2).view(2, *shape)
    return Plane(torch.zeros(*shape), across, up, 0.0, 0.0, 1.0)


class Scene(NamedTuple):
    """What is drawn on the maps of a plane beside the regions; coordinates are those of `Plane.coordinates`."""

    plane: Plane
    samples: NDArray[np.float64]
    """(S, 2): boundary-supporting samples."""
    paths: Sequence[NDArray[np.float64]]
    """(P, 2) each: where a search was on its way from an image to its sample."""
    images: NDArray[np.float64]
    """(N, 2): training images."""
    labels: NDArray[np.int64]
    """(N,): their classes."""


def search_path(logits_of: LogitsFunction, image: Tensor, base: int, target: int) -> Tensor:
    """Every point (P, C, H, W) at which the default search looks on its way from an image (C, H, W), in order."""
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return logits_of(x)

    newton(watched, image[None], torch.tensor([base]), torch.tensor([target]))
    return torch.cat(seen)


def logits_on(model: torch.nn.Module, plane: Plane, device: torch.device) -> NDArray[np.float32]:
    """(classes, side, side) logits on a plane: asked at some points, and interpolated (bicubic) between them."""
    with torch.no_grad():
        known = logits_in_batches(model.eval(), plane.points(POINTS).to(device), 256).float().cpu()
    grid = known.T.reshape(1, -1, POINTS, POINTS)
    return F.interpolate(grid, scale_factor=REFINEMENT, mode="bicubic", align_corners=True)[0].numpy()


def margin_on(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """(side, side): the best logit less the second best of (classes, side, side)."""
    second, best = np.partition(logits, -2, axis=0)[-2:]
    return np.asarray(best - second)


def class_colours(classes: int) -> list[tuple[float, float, float]]:
    """A colour for each class, light enough for dark ink on it."""
    from matplotlib import colormaps

    palette = np.array(colormaps["tab10" if classes <= 10 else "tab20"].colors)  # type: ignore[attr-defined]
    return [tuple((0.45 * palette[number % len(palette)] + 0.55).tolist()) for number in range(classes)]


def draw_map(
    axes: Any, scene: Scene, logits: NDArray[np.float32], names: Sequence[str], teacher: NDArray[np.float32] | None
) -> None:
    """Draw one network's map: class regions, contours of the logit margin, and the scene's points.

    Args:
        axes: of matplotlib.
        scene: the plane and what lies on it.
        logits: (classes, side, side) of the network.
        names: of the classes.
        teacher: (classes, side, side); its boundaries are drawn dashed.
    """
    plane, colours = scene.plane, class_colours(len(names))
    right, top = plane.left + plane.side, plane.bottom + plane.side
    extent = (plane.left, right, plane.bottom, top)
    regions = logits.argmax(0)
    axes.imshow(np.array(colours)[regions], origin="lower", extent=extent, interpolation="nearest")
    contours = {"origin": "lower", "extent": extent, "colors": INK}
    axes.contour(margin_on(logits), LEVELS, linewidths=0.5, alpha=0.35, **contours)
    for boundary, style in ((logits, "solid"), (teacher, "dashed")):
        for field in _boundaries(boundary):
            axes.contour(field, [0], linewidths=1.4, linestyles=style, **contours)
    for name, x, y in _names_in(regions, names, plane):
        axes.text(x, y, name, ha="center", va="center", fontsize=9, color=INK, alpha=0.75)
    _draw_points(axes, scene, colours)
    axes.set(xlim=(plane.left, right), ylim=(plane.bottom, top))
    axes.set_axis_off()


def _boundaries(logits: NDArray[np.float32] | None) -> Iterator[NDArray[np.float32]]:
    """Fields that are zero on the boundaries, each boundary in one of them (dashes drawn twice would fill their gaps).

    A field is masked where a class has the one or the other of the two largest logits that had a field before.
    """
    if logits is None:
        return
    order = np.argsort(logits, axis=0)
    first, second = order[-1], order[-2]
    drawn = np.zeros(first.shape, bool)
    for number in np.unique(first)[:-1]:
        field = logits[number] - np.delete(logits, number, 0).max(0)
        yield np.ma.masked_array(field, drawn)
        drawn |= (first == number) | (second == number)


def _names_in(regions: NDArray[np.int64], names: Sequence[str], plane: Plane) -> Iterator[tuple[str, float, float]]:
    """The name of each large region's class, and the point of the region that is farthest from its end."""
    from scipy.ndimage import distance_transform_edt, label

    pixel = plane.side / len(regions)
    for number in np.unique(regions):
        parts, count = label(regions == number)
        for part in range(1, count + 1):
            inside = parts == part
            if inside.mean() >= SMALLEST_LABEL:
                depth = distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
                row, column = np.unravel_index(depth.argmax(), depth.shape)
                yield names[number], plane.left + column * pixel, plane.bottom + row * pixel


def _draw_points(axes: Any, scene: Scene, colours: Sequence[tuple[float, float, float]]) -> None:
    edge = {"edgecolors": INK, "zorder": 3}
    small = len(scene.images) > 1
    axes.scatter(
        *scene.images.T,
        s=9 if small else 40,
        c=[colours[label] for label in scene.labels] if small else PAPER,
        linewidths=0.4 if small else 1.2,
        **edge,
    )
    for path in scene.paths:
        axes.plot(*path.T, color=INK, linewidth=0.9, marker=".", markersize=2.5, zorder=4)
    axes.scatter(*scene.samples.T, s=16 if small else 60, c=PAPER, marker="D", linewidths=0.9, edgecolors=INK, zorder=5)


def map_png(
    scene: Scene, logits: NDArray[np.float32], names: Sequence[str], teacher: NDArray[np.float32] | None
) -> bytes:
    """A picture of one network's map alone, as PNG; arguments as of `draw_map`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES, INCHES), dpi=DOTS_PER_INCH)
    draw_map(figure.add_axes((0, 0, 1, 1)), scene, logits, names, teacher)
    return _png(figure)


def maps_png(scene: Scene, maps: Mapping[str, NDArray[np.float32]], names: Sequence[str]) -> bytes:
    """Maps of several networks side by side under their names, the teacher's first, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES * len(maps), INCHES * 1.1), dpi=DOTS_PER_INCH, layout="constrained")
    teacher = next(iter(maps.values()))
    for axes, (title, logits) in zip(figure.subplots(1, len(maps)), maps.items(), strict=True):
        draw_map(axes, scene, logits, names, None if logits is teacher else teacher)
        axes.set_title(title, fontsize=10)
    return _png(figure)


def _png(figure: Any) -> bytes:
    content = BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
