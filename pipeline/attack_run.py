"""The attack over a whole training split: which shards are missing, making them, publishing the dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipeline.attack import Block, Search
from pipeline.card import BESIDE, NOTHING_STATED, PUBLISHED, write_card
from pipeline.config import Attack, Card, Dataset
from pipeline.data import Prepared
from pipeline.errors import ParameterError, ShardError
from pipeline.forks import interrupts_wait, run_in_forks
from pipeline.provenance import code_digest, fingerprint
from pipeline.runtime import return_freed_memory
from pipeline.shard_check import is_shard
from pipeline.shard_file import read_columns
from pipeline.shard_format import (
    FORMAT_VERSION,
    MANIFEST,
    Augmentation,
    Digests,
    Manifest,
    ShardEntry,
    columns_of,
    count_statuses,
    manifest_text,
    totals_of,
)
from pipeline.shard_store import stored_name
from pipeline.shard_writer import write_shard
from pipeline.storage import Store, atomic_directory, copy_file, write_atomically

Result = TypeVar("Result")

# The modules that decide what is in a shard: an edit to one of them makes stored shards invalid.
CODE = ("pipeline.attack", "pipeline.runtime", "pipeline.shard_writer")


class SampleDataset:
    """A sample dataset as the parameters ask for it, and its finished shards in the store.

    Args:
        train: the prepared training split.
        dataset, attack: parameters.
        teacher: sha256 of the teacher's weights file.
        store: where finished shards are kept.
    """

    def __init__(self, train: Prepared, dataset: Dataset, attack: Attack, teacher: str, store: Store) -> None:
        classes = len(train.class_names)
        if attack.targets >= classes:
            raise ParameterError(
                f"attack.targets: expected at most {classes - 1}, one less than the classes, got {attack.targets}"
            )
        self.train, self.dataset, self.attack, self.store = train, dataset, attack, store
        self.digests = Digests(teacher=teacher, train=train.digest)
        self.columns = columns_of(train.image_shape, classes, attack.targets, attack.embed_images)
        # Everything that decides a shard's content; not `views`, so that more views reuse those that are there.
        self.parameters = {
            "attack": attack.model_dump(exclude={"views"}),
            "augmentation": {"padding": dataset.padding, "flip": dataset.flip},
        }
        self.fingerprint = fingerprint(FORMAT_VERSION, self.parameters, self.digests.model_dump(), code_digest(*CODE))

    @property
    def blocks(self) -> list[Block]:
        """All shards of the dataset, by view, then block."""
        starts = range(0, len(self.train.labels), self.attack.rows_per_shard)
        return [
            Block(view, number, start, min(self.attack.rows_per_shard, len(self.train.labels) - start))
            for view in range(self.attack.views)
            for number, start in enumerate(starts)
        ]

    def stored_name(self, block: Block) -> str:
        return stored_name(self.fingerprint, block.view, block.number)

    def missing(self) -> list[Block]:
        """The shards that are not in the store, or no longer as they were written; clears up after killed runs."""
        self.store.sweep(self.fingerprint)
        stored = _side_by_side(self.stored, self.blocks)
        return [block for block, path in zip(self.blocks, stored, strict=True) if path is None]

    def stored(self, block: Block) -> Path | None:
        """The path of a finished shard in the store; None if there is none, or it is another one under its name."""
        path = self.store.find(self.stored_name(block))
        return path if path and is_shard(path, self.fingerprint, block.view, block.number) else None

    def make(self, search: Search, blocks: list[Block], workers: int = 1) -> Iterator[Block]:
        """Make shards in the store; yields each when it is there to stay.

        Args:
            search: on this process's device.
            blocks: which shards.
            workers: with more than one, so many forks of this process make shards side by side, on a CPU; the bytes are
                the same, the order is not.

        Raises:
            WorkerError: a fork was killed.
        """
        if workers == 1:
            for block in blocks:
                self._make_one(search, block)
                yield block
        else:
            return_freed_memory()  # which each fork would have again
            for number in run_in_forks([partial(self._make_one, search, block) for block in blocks], workers):
                yield blocks[number]

    def _make_one(self, search: Search, block: Block, slot: int = 0) -> None:
        self.write(self.store.path(self.stored_name(block)), search, block)
        self.store.seal(self.stored_name(block))
        return_freed_memory()

    def write(self, path: Path, search: Search, block: Block) -> None:
        """Search, and write what is found to a file."""
        write_shard(
            path,
            search.shard_values(self.train, block),
            self.columns,
            fingerprint=self.fingerprint,
            view=block.view,
            block=block.number,
            compression=self.attack.compression,
        )

    def prune(self) -> int:
        """Remove all other shards from the store; returns how many."""
        return self.store.prune(self.stored_name(block) for block in self.blocks)

    def manifest(self, entries: list[ShardEntry]) -> Manifest:
        train = self.train
        return Manifest(
            format_version=FORMAT_VERSION,
            fingerprint=self.fingerprint,
            columns=self.columns,
            parameters=self.parameters,
            class_names=list(train.class_names),
            image_shape=train.image_shape,
            mean=list(train.mean),
            std=list(train.std),
            augmentation=Augmentation(padding=self.dataset.padding, flip=self.dataset.flip),
            digests=self.digests,
            rows=len(train.labels),
            views=self.attack.views,
            targets=self.attack.targets,
            shards=entries,
            totals=totals_of(entries, self.attack.targets),
        )

    def publish(self, directory: Path, card: Card = NOTHING_STATED) -> Manifest:
        """Gather the shards of this dataset into a directory, with its card, the manifest last; replaces what is there.

        Raises:
            ShardError: the store lacks a shard.
        """
        with atomic_directory(directory, *PUBLISHED, beside=BESIDE) as temporary:
            entries = _side_by_side(partial(self._publish_one, temporary), self.blocks)
            manifest = self.manifest(entries)
            write_card(temporary, manifest, card)
            write_atomically(temporary / MANIFEST, manifest_text(manifest))
        return manifest

    def _publish_one(self, directory: Path, block: Block) -> ShardEntry:
        """Copy a shard into a directory; returns the manifest's row for it."""
        name = self.stored_name(block)
        source = self.stored(block)
        if source is None:
            raise ShardError(f"{self.store.path(name)}: missing, run the attack again")
        copy_file(source, directory / source.name)
        return ShardEntry(
            name=source.name,
            view=block.view,
            block=block.number,
            rows=block.rows,
            bytes=source.stat().st_size,
            sha256=self.store.digest(name),
            statuses=count_statuses(read_columns(source, ["status"])["status"]),
        )


def _side_by_side(function: Callable[[Block], Result], blocks: list[Block]) -> list[Result]:
    """Results of a function that waits for files, or digests them, of all blocks: in threads."""
    with ThreadPoolExecutor() as pool:
        try:
            with interrupts_wait():  # one that comes between two locks of the pool would leave its threads waiting
                results = pool.map(function, blocks)
            return list(results)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
