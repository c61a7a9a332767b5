"""Decision maps: what networks say on a plane through pixel space, as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.networks.predict import rows_of_a_batch
from pipeline.search.boundary import LogitsFunction, logits_in_batches
from pipeline.search.find import find_boundary

SIDE = 366  # pixels of a map
POINTS = ((3 * 64 * 64, 61), (3 * 128 * 128, 31))  # along each side, for images of at most so many values
FEWEST_POINTS = 21  # for larger ones: networks are asked at each
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
        """Return points (number * number, C, H, W) of the square, row by row from the bottom, not clipped to [0, 1]."""
        steps = torch.linspace(0, self.side, number)
        b, a = torch.meshgrid(self.bottom + steps, self.left + steps, indexing="ij")
        shape = (-1, *[1] * self.origin.ndim)
        return self.origin + a.reshape(shape) * self.across + b.reshape(shape) * self.up

    def coordinates(self, images: Tensor) -> NDArray[np.float64]:
        """Return (N, 2): where images (N, C, H, W) are, or their projections on the plane."""
        offsets = (images - self.origin).flatten(1).double()
        axes = torch.stack([self.across.flatten(), self.up.flatten()], 1).double()
        return (offsets @ axes).numpy()


def plane_through(image: Tensor, first: Tensor, second: Tensor) -> Plane:
    """Return the plane through three points (C, H, W), or through a line of them and an arbitrary direction.

    Points that are all the same are in the middle of a square of side 1.
    """
    arbitrary = torch.randn(2, image.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    offsets = torch.stack([first - image, second - image]).flatten(1).double()
    across, up = (axis.view_as(image).float() for axis in _orthonormal([*offsets, *arbitrary])[:2])
    plane = Plane(image, across, up, 0, 0, 0)
    places = plane.coordinates(torch.stack([image, first, second]))
    low, high = places.min(0), places.max(0)
    side = float((high - low).max()) * (1 + 2 * MARGIN_AROUND) or 1.0
    left, bottom = ((low + high) / 2 - side / 2).tolist()
    return plane._replace(left=left, bottom=bottom, side=side)


def _orthonormal(directions: Iterable[Tensor]) -> list[Tensor]:
    """Return axes of length 1 by Gram and Schmidt, without directions that the ones before nearly span."""
    axes: list[Tensor] = []
    for direction in directions:
        rest = direction.clone()
        for axis in axes:
            rest -= rest.dot(axis) * axis
        if rest.norm() > 1e-3 * direction.norm():
            axes.append(F.normalize(rest, dim=0))
    return axes


def unit_square(shape: Sequence[int]) -> Plane:
    """Return all images of two pixels, of shape (C, H, W): the first pixel to the right, the second one up."""
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
    """Return the points (P, C, H, W) at which the default search looks on its way from an image (C, H, W)."""
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return logits_of(x)

    find_boundary(watched, image[None], torch.tensor([base]), torch.tensor([target]), quantise=True)
    return torch.cat(seen)


def logits_on(model: torch.nn.Module, plane: Plane, device: torch.device) -> NDArray[np.float32]:
    """Return logits (classes, side, side) at a picture's pixels: cubic splines through those at some points."""
    from scipy.interpolate import make_interp_spline

    count = next((points for values, points in POINTS if plane.origin.numel() <= values), FEWEST_POINTS)
    rows = rows_of_a_batch(plane.origin.shape)
    with torch.no_grad():
        known = logits_in_batches(model.eval(), plane.points(count).to(device), rows).float().cpu().numpy()
    middles = (np.arange(SIDE) + 0.5) / SIDE * (count - 1)
    weights = make_interp_spline(np.arange(count), np.eye(count))(middles).astype(np.float32)
    return np.asarray(weights @ known.T.reshape(-1, count, count) @ weights.T)


def margin_on(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (side, side): the best logit less the second best of (classes, side, side)."""
    second, best = np.partition(logits, -2, axis=0)[-2:]
    return np.asarray(best - second)


def _palette(classes: int) -> NDArray[np.float64]:
    """Return (classes, 3): a colour for each class; the twenty-first has that of the first."""
    from matplotlib import colormaps

    colours: Any = colormaps["tab10" if classes <= 10 else "tab20"]
    return np.array([colours.colors[number % colours.N] for number in range(classes)])


def draw_map(
    axes: Any, scene: Scene, logits: NDArray[np.float32], names: Sequence[str], teacher: NDArray[np.float32] | None
) -> None:
    """Draw one network's map: class regions, contours of the logit margin, and the scene's points.

    Args:
        axes: of matplotlib.
        scene: the plane and what lies on it.
        logits: (classes, side, side) of the network.
        names: of the classes.
        teacher: (classes, side, side); its boundaries are drawn dashed. None on the map of the teacher itself, which
            also has the paths to the samples.
    """
    plane = scene.plane
    right, top = plane.left + plane.side, plane.bottom + plane.side
    extent = (plane.left, right, plane.bottom, top)
    regions = logits.argmax(0)
    light = 0.45 * _palette(len(names)) + 0.55  # so that dark ink can be read on it
    axes.imshow(light[regions], origin="lower", extent=extent, interpolation="nearest")
    contours = {"origin": "lower", "extent": extent, "colors": INK}
    axes.contour(margin_on(logits), LEVELS, linewidths=0.5, alpha=0.35, **contours)
    for boundary, style in ((logits, "solid"), (teacher, "dashed")):
        for field in _boundaries(boundary):
            axes.contour(field, [0], linewidths=1.4, linestyles=style, **contours)
    for name, x, y in _names_in(regions, names, plane):
        axes.text(x, y, name, ha="center", va="center", fontsize=9, color=INK, alpha=0.75, parse_math=False)
    if teacher is None:
        _draw_paths(axes, scene, len(names))
    few = len(scene.images) == 1
    if few:
        axes.scatter(*scene.images.T, s=40, c=PAPER, linewidths=1.2, edgecolors=INK, zorder=4)
    axes.scatter(*scene.samples.T, s=60 if few else 12, c=PAPER, marker="D", linewidths=0.9, edgecolors=INK, zorder=5)
    axes.set(xlim=(plane.left, right), ylim=(plane.bottom, top))
    axes.set_axis_off()


def _boundaries(logits: NDArray[np.float32] | None) -> Iterator[NDArray[np.float32]]:
    """Yield fields that are zero on the boundaries, each boundary in one: dashes drawn twice fill their gaps.

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
    """Yield the name of each large region's class, and the point of the region that is farthest from its end."""
    from scipy.ndimage import distance_transform_edt, label

    pixel = plane.side / len(regions)
    for number in np.unique(regions):
        parts, count = label(regions == number)
        for part in range(1, count + 1):
            inside = parts == part
            if inside.mean() >= SMALLEST_LABEL:
                depth = distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
                row, column = np.unravel_index(depth.argmax(), depth.shape)
                yield names[number], plane.left + (column + 0.5) * pixel, plane.bottom + (row + 0.5) * pixel


def _draw_paths(axes: Any, scene: Scene, classes: int) -> None:
    """Draw what a teacher's map has beside the samples: training images in the colours of their classes, and paths."""
    colours = _palette(classes)[scene.labels]
    axes.scatter(*scene.images.T, s=12, c=colours, linewidths=0.4, edgecolors=PAPER, zorder=3)
    for path in scene.paths:
        axes.plot(*path.T, color=INK, linewidth=0.9, marker=".", markersize=2.5, zorder=4)


def agreement_on(logits: NDArray[np.float32], teacher: NDArray[np.float32]) -> float:
    """Return the fraction of a plane on which two networks, (classes, side, side) each, predict the same class."""
    return float((logits.argmax(0) == teacher.argmax(0)).mean())


def map_png(
    scene: Scene, logits: NDArray[np.float32], names: Sequence[str], teacher: NDArray[np.float32] | None
) -> bytes:
    """Return a picture of one network's map alone, as PNG; arguments as of `draw_map`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES, INCHES), dpi=DOTS_PER_INCH)
    draw_map(figure.add_axes((0, 0, 1, 1)), scene, logits, names, teacher)
    return png_of(figure)


def png_of(figure: Any) -> bytes:
    """Return a figure of matplotlib as PNG, without the name of the program."""
    content = BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
