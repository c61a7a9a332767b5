"""From a dataset to prepared files: splits, decoding, statistics."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from pipeline.core.errors import DataError, shown
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
from pipeline.prepare.picture import DOUBTFUL, FRAMES, TRANSPARENT, TURNED, Picture, picture_of
from pipeline.prepare.splits import _check_all_classes, channel_statistics, split

ROWS_OF_A_TASK = 64  # at most; decoded by one thread at a time
REMARKS = {
    TRANSPARENT: "images with transparent pixels, laid over gray level {background} (dataset.background)",
    TURNED: "images turned upright, as their EXIF orientation says",
    FRAMES: "images of several frames or pages, of which the first one is taken",
    DOUBTFUL: "images that are read, but perhaps not as they were meant",
}


class Written(NamedTuple):
    """What was prepared."""

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    counts: dict[str, int]
    """Images in each split."""
    class_counts: list[int]
    """Images of each class in all splits."""
    bad: list[str]
    """What is wrong with each image that was left out."""
    notes: list[str]
    """How images were changed, in words."""
    warnings: list[str]
    """Splits in which there is nothing to learn, in words."""


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
    class_counts = np.zeros(len(source.class_names), np.int64)
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    total = sum(len(part.labels) for part in parts.values())
    with tqdm(total=total, desc="prepare", unit="image", disable=None, leave=False) as bar:
        for name in SPLITS:
            with tempfile.TemporaryFile(dir=directory) as pixels:
                larger = dataset.train_size if name == "train" else None
                decoder.scale_to(larger or dataset.image_size)
                labels = decoder.decode(name, parts[name], pixels, bar)
                counts[name] = len(labels)
                class_counts += np.bincount(labels, minlength=len(class_counts))
                if len(parts[name].labels) and not len(labels):
                    raise DataError(f"no image of the {name} split can be read")
                if statistics is None:
                    _check_all_classes(labels, source.class_names)
                    statistics = channel_statistics(_blocks(pixels, decoder.shape))
                digest = content_digest(_blocks(pixels, decoder.shape), decoder.shape, labels, source.class_names)
                nothing = np.broadcast_to(np.uint8(0), (len(labels), *decoder.shape))
                view_size = dataset.image_size if larger else None
                prepared = Prepared(nothing, labels, source.class_names, *statistics, digest, view_size)
                write_prepared(directory / f"{name}.h5", prepared, _blocks(pixels, decoder.shape))
    return Written(
        source.class_names,
        decoder.shape,
        counts,
        class_counts.tolist(),
        decoder.bad,
        list(decoder.notes()),
        decoder.warnings,
    )


def _blocks(pixels: BinaryIO, image_shape: tuple[int, int, int]) -> Iterator[Images]:
    """Yield the images in a file that holds nothing else."""
    size = int(np.prod(image_shape))
    pixels.seek(0)
    while content := pixels.read(rows_at_a_time(image_shape) * size):
        yield np.frombuffer(content, np.uint8).reshape(-1, *image_shape)


class _Heard(threading.local):
    """What this thread was warned of while it decoded an image; None elsewhere."""

    texts: list[str] | None = None


_heard = _Heard()


@contextlib.contextmanager
def _hearing_warnings() -> Iterator[None]:
    """Keep what PIL warns of for the image in question, rather than print it.

    That an image is large is no news: above twice that size, PIL refuses it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("always", module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        print_warning = warnings.showwarning

        def hear(message: Warning | str, *others: Any, **more: Any) -> None:
            if _heard.texts is None:
                print_warning(message, *others, **more)
            else:
                _heard.texts.append(shown(one_line(message)))

        warnings.showwarning = hear
        yield


class _Sameness:
    """Whether the images of a split are all equal, or each is of one colour."""

    def __init__(self) -> None:
        self.count, self.equal, self.flat = 0, True, True
        self.first: Images | None = None

    def see(self, image: Images) -> None:
        """Take in one more image (C, H, W)."""
        self.count += 1
        if self.first is None:
            self.first = image
        self.equal = self.equal and np.array_equal(image, self.first)
        self.flat = self.flat and bool((image == image[:, :1, :1]).all())

    def in_words(self, split: str) -> Iterator[str]:
        """Say what hinders learning from this split."""
        if self.count > 1 and self.equal:
            yield f"all {self.count:,} images of the {split} split are equal: no class can be told from another"
        elif self.first is not None and self.first[0].size > 1 and self.flat:
            yield f"each image of the {split} split ({self.count:,}) is of one colour all over"


class _Decoder:
    """Decodes images in several threads into arrays of one shape, which the first image decides."""

    shape: tuple[int, int, int]

    def __init__(self, dataset: Dataset, threads: int) -> None:
        self.dataset, self.threads, self.size = dataset, threads, dataset.image_size
        self.bad: list[str] = []
        self.warnings: list[str] = []
        self.remarks: Counter[str] = Counter()
        self.first_remarks: dict[str, str] = {}

    def scale_to(self, size: tuple[int, int] | None) -> None:
        """Scale the images that follow to a height and width; None: leave them as they are."""
        self.size = size
        if size and hasattr(self, "shape"):
            self.shape = self.shape[0], *size

    def decode(self, split: str, part: Part, pixels: BinaryIO, bar: tqdm[Any]) -> NDArray[np.int64]:
        """Append the images of a part to a file, in order; returns the labels of those that could be read."""
        good = np.ones(len(part.labels), bool)
        sameness = _Sameness()
        with _hearing_warnings():
            for start, pictures in self._in_order(part):
                for row, picture in enumerate(pictures, start):
                    if isinstance(picture, str):
                        self._report(picture)
                        good[row] = False
                    else:
                        self._check_shape(picture.pixels, part.name(row))
                        self._remember(picture.remarks, part.name(row))
                        sameness.see(picture.pixels)
                        pixels.write(picture.pixels.data)
                bar.update(len(pictures))
        self.warnings += sameness.in_words(split)
        return part.labels[good]

    def _remember(self, remarks: dict[str, str], name: str) -> None:
        self.remarks.update(remarks.keys())
        for kind, detail in remarks.items():
            self.first_remarks.setdefault(kind, f"{name}: {detail}" if detail else name)

    def notes(self) -> Iterator[str]:
        """Say how images were changed: of each kind, how many and the first one."""
        for kind, text in REMARKS.items():
            if count := self.remarks[kind]:
                words = text.format(background=self.dataset.background)
                yield f"{words}: {count:,}, the first is {self.first_remarks[kind]}"

    def _in_order(self, part: Part) -> Iterator[tuple[int, list[Picture | str]]]:
        """Yield results of tasks, a few of which are under way at a time."""
        waiting: deque[tuple[int, Future[list[Picture | str]]]] = deque()
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

    def _decode_rows(self, part: Part, rows: Iterable[int]) -> list[Picture | str]:
        """Return the picture of each row, or what is wrong with it."""
        return [self._decode_row(part, row) for row in rows]

    def _decode_row(self, part: Part, row: int) -> Picture | str:
        dataset, doubts = self.dataset, list[str]()
        _heard.texts = doubts
        try:
            with part.image(row) as image:
                picture = picture_of(image, self.size, dataset.channels, dataset.background)
        except UnidentifiedImageError:  # its message names an address in memory
            return f"{part.name(row)}: cannot be read: it is damaged, no image, or of a kind that is not read here"
        except Exception as error:  # PIL raises all kinds on damaged images
            return f"{part.name(row)}: cannot be read: {shown(one_line(error))}"
        finally:
            _heard.texts = None
        return picture._replace(remarks={DOUBTFUL: doubts[0]} | picture.remarks) if doubts else picture

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
