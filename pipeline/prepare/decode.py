"""From a dataset to prepared files: splits, decoding, statistics."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm import tqdm

from pipeline.core.errors import DataError
from pipeline.core.parameters import Dataset
from pipeline.core.text import one_line
from pipeline.images.prepared import (
    SPLITS,
    Images,
    Prepared,
    content_digest,
    rows_at_a_time,
    write_prepared,
)
from pipeline.machine.processor import threads as default_threads
from pipeline.prepare.datasets import Part, RawDataset
from pipeline.prepare.splits import _check_all_classes, channel_statistics, split

ROWS_OF_A_TASK = 64  # at most; decoded by one thread at a time
GRAY_MODES = ("1", "L", "LA", "La")
COLOUR_MODES = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB")


class Written(NamedTuple):
    """What was prepared."""

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    counts: dict[str, int]
    """Images in each split."""
    bad: list[str]
    """What is wrong with each image that was left out."""


def prepare(source: RawDataset, dataset: Dataset, directory: Path, threads: int | None = None) -> Written:
    """Decode a dataset and write train.h5, validation.h5 and test.h5; the statistics come from train alone.

    A few megabytes of images for each thread are in memory at a time.

    Args:
        source: the dataset.
        dataset: how to split and decode it.
        directory: where to write; takes temporary files of the size of the largest split, too.
        threads: that decode; by default as many as this process should use.

    Raises:
        DataError: the dataset is unusable, or an image is damaged or of another size than the others.
    """
    parts = split(source, dataset)
    decoder = _Decoder(dataset, threads or default_threads().most)
    counts: dict[str, int] = {}
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    total = sum(len(part.labels) for part in parts.values())
    with tqdm(total=total, desc="prepare", unit="image", disable=None, leave=False) as bar:
        for name in SPLITS:
            with tempfile.TemporaryFile(dir=directory) as pixels:
                labels = decoder.decode(parts[name], pixels, bar)
                counts[name] = len(labels)
                if len(parts[name].labels) and not len(labels):
                    raise DataError(f"no image of the {name} split can be read")
                if statistics is None:
                    _check_all_classes(labels, source.class_names)
                    statistics = channel_statistics(_blocks(pixels, decoder.shape))
                digest = content_digest(_blocks(pixels, decoder.shape), decoder.shape, labels, source.class_names)
                nothing = np.broadcast_to(np.uint8(0), (len(labels), *decoder.shape))
                prepared = Prepared(nothing, labels, source.class_names, *statistics, digest)
                write_prepared(directory / f"{name}.h5", prepared, _blocks(pixels, decoder.shape))
    return Written(source.class_names, decoder.shape, counts, decoder.bad)


def _blocks(pixels: BinaryIO, image_shape: tuple[int, int, int]) -> Iterator[Images]:
    """Yield the images in a file that holds nothing else."""
    size = int(np.prod(image_shape))
    pixels.seek(0)
    while content := pixels.read(rows_at_a_time(image_shape) * size):
        yield np.frombuffer(content, np.uint8).reshape(-1, *image_shape)


class _Decoder:
    """Decodes images in several threads into arrays of one shape, which the first image decides."""

    shape: tuple[int, int, int]

    def __init__(self, dataset: Dataset, threads: int) -> None:
        self.dataset, self.threads = dataset, threads
        self.bad: list[str] = []

    def decode(self, part: Part, pixels: BinaryIO, bar: tqdm[Any]) -> NDArray[np.int64]:
        """Append the images of a part to a file, in order; returns the labels of those that could be read."""
        good = np.ones(len(part.labels), bool)
        for start, images in self._in_order(part):
            for row, image in enumerate(images, start):
                if isinstance(image, str):
                    self._report(image)
                    good[row] = False
                else:
                    self._check_shape(image, part.name(row))
                    pixels.write(image.data)
            bar.update(len(images))
        return part.labels[good]

    def _in_order(self, part: Part) -> Iterator[tuple[int, list[Images | str]]]:
        """Yield results of tasks, a few of which are under way at a time."""
        waiting: deque[tuple[int, Future[list[Images | str]]]] = deque()
        yield 0, self._decode_rows(part, range(min(1, len(part.labels))))  # decides the shape
        step = min(ROWS_OF_A_TASK, rows_at_a_time(self.shape)) if hasattr(self, "shape") else 1
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for start in range(1, len(part.labels), step):
                    rows = range(start, min(start + step, len(part.labels)))
                    waiting.append((start, pool.submit(self._decode_rows, part, rows)))
                    if len(waiting) > 2 * self.threads:
                        first, task = waiting.popleft()
                        yield first, task.result()
                for first, task in waiting:
                    yield first, task.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _decode_rows(self, part: Part, rows: Iterable[int]) -> list[Images | str]:
        """Return an image (C, H, W) of each row, or what is wrong with it."""
        images: list[Images | str] = []
        for row in rows:
            try:
                with part.image(row) as image:
                    images.append(to_array(image, self.dataset.image_size, self.dataset.channels))
            except Exception as error:  # PIL raises all kinds on damaged images
                images.append(f"{part.name(row)}: cannot be read: {one_line(error)}")
        return images

    def _report(self, problem: str) -> None:
        if not self.dataset.skip_bad:
            raise DataError(f"{problem}; mend or remove it, or skip such images: dataset.skip_bad, or --skip-bad")
        self.bad.append(problem)

    def _check_shape(self, image: Images, name: str) -> None:
        channels, height, width = image.shape
        if not hasattr(self, "shape"):
            self.shape = channels, height, width
        first_channels, *first_size = self.shape
        if first_size != [height, width]:
            raise DataError(
                f"{name}: is {height}x{width}, the first image is {first_size[0]}x{first_size[1]}: set "
                "dataset.image_size: [HEIGHT, WIDTH] to resize all"
            )
        if first_channels != channels:
            raise DataError(
                f"{name}: has {channels} channels, the first image has {first_channels}: set dataset.channels to 1 or "
                "3 to convert all"
            )


def to_array(image: Image.Image, size: tuple[int, int] | None, channels: int | None) -> Images:
    """Return an image as an array (C, H, W).

    Args:
        image: of any mode of at most 8 bits a channel; transparency is dropped.
        size: (height, width) to scale it to, its aspect ratio kept: the middle is cut out.
        channels: 1 for gray, 3 for RGB; by default, what the image has.

    Raises:
        ValueError: the image has more than 8 bits a channel.
    """
    if image.mode not in GRAY_MODES + COLOUR_MODES:
        raise ValueError(f"mode {image.mode} has more than 8 bits a channel: convert it first")
    gray = image.mode in GRAY_MODES if channels is None else channels == 1
    image = image.convert("L" if gray else "RGB")
    if size is not None and size != (image.height, image.width):
        image = ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return np.ascontiguousarray(array[None] if gray else array.transpose(2, 0, 1))
