"""The attack over a whole training split: which shards are missing, making them, publishing the dataset."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray

from pipeline.attack.columns import Block, joint_values, shard_values
from pipeline.core.errors import ParameterError, ShardError
from pipeline.core.extensions import own_modules
from pipeline.core.files import atomic_directory, link_file, write_atomically
from pipeline.core.parameters import Attack, Card, Params, Views
from pipeline.core.provenance import code_digest, fingerprint
from pipeline.core.store import Store
from pipeline.images.prepared import Prepared
from pipeline.machine.device import one_cpu_thread, return_freed_memory, search_batch, set_up_device, side_by_side
from pipeline.machine.forks import interrupts_wait, run_in_forks
from pipeline.networks.classifier import Classifier
from pipeline.networks.loading import Loaded
from pipeline.networks.penultimate import penultimate_size
from pipeline.publish.adopt import facts_of, stored_name
from pipeline.publish.card import CARD_FILES, DATASET_FILES, EMPTY_CARD, write_card
from pipeline.publish.writer import write_shard
from pipeline.search.table import module_of, search_of
from pipeline.search.teacher_search import TeacherSearch
from pipeline.shards.file import read_columns
from pipeline.shards.format import (
    MANIFEST,
    Column,
    attributes_of,
    columns_of,
    count_statuses,
    shard_name,
    version_of,
)
from pipeline.shards.manifest import Augmentation, Digests, Manifest, ShardEntry, manifest_text, totals_of

Result = TypeVar("Result")

SHARDS_AT_ONCE = 16
SEARCH_SHARE, SEARCH_BYTES = 0.25, 32  # of free memory for the state of a search; bytes of it a pixel and channel

# The modules that decide what is in a shard: an edit to one of them makes stored shards invalid.
CODE = ("pipeline.attack.columns", "pipeline.machine.device", "pipeline.publish.writer")


def shard_code(search: str | None, teacher_network: str) -> str:
    """Return the digest of the code that decides what is in a shard, by a named search of a named network.

    Without a search it is that of the columns that no search fills in.
    """
    return code_digest(*CODE, *([module_of(search)] if search else []), *own_modules(teacher_network))


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleDataset:
    """A sample dataset as the parameters ask for it, and its finished shards in the store."""

    train: Prepared
    views: Views
    attack: Attack
    parameters: dict[str, Any]
    """Those that decide what is in a shard, in the form that a manifest has them."""
    digests: Digests
    columns: dict[str, Column]
    fingerprint: str
    store: Store
    """Where finished shards are kept."""

    @classmethod
    def of(cls, train: Prepared, params: Params, teacher: Loaded, store: Store) -> SampleDataset:
        """Describe the sample dataset of a training split and a teacher.

        Raises:
            ParameterError: the parameters ask for more target classes than there are, or for features of a teacher that
                has none.
        """
        attack, classes = params.attack, len(train.class_names)
        if attack.targets >= classes:
            raise ParameterError(
                f"attack.targets: expected at most {classes - 1}, one less than the classes, got {attack.targets}"
            )
        given = params.search.model_dump(exclude={"name"}, exclude_defaults=True)
        search = {"search": params.search.name, **given} if attack.targets else {}
        parameters = {
            # Not the number of views, so that more views reuse those that are there.
            "attack": attack.model_dump(exclude={"views"}, exclude_defaults=True) | search,
            "augmentation": params.views.model_dump(mode="json", exclude_defaults=True),
        }
        if train.view_size:
            parameters["augmentation"]["image_size"] = list(train.images.shape[2:])
        digests = Digests(teacher=teacher.digest, train=train.digest)
        columns = columns_of(
            train.view_shape,
            classes,
            attack.targets,
            attack.embed_images,
            params.views,
            train.images.shape[2:],
            attack.logits,
            penultimate_size(teacher.model) if attack.features else 0,
        )
        code = shard_code(params.search.name if attack.targets else None, teacher.model.architecture.network)
        return cls(
            train=train,
            views=params.views,
            attack=attack,
            parameters=parameters,
            digests=digests,
            columns=columns,
            fingerprint=fingerprint(version_of(columns), parameters, digests.model_dump(), code),
            store=store,
        )

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

    def unsure(self) -> list[Block]:
        """Return the shards that the store lacks, or that may have changed since; clear up after killed runs.

        No shard is read.
        """
        self.store.sweep(self.fingerprint)
        return self._blocks_without(self.blocks, lambda block: self.store.unchanged(self.stored_name(block)))

    def missing(self) -> list[Block]:
        """Return the shards that the store lacks or has damaged; clear up after killed runs.

        Of those that may have changed since they were recorded, the digest decides.
        """
        return self._blocks_without(self.unsure(), self.entry)

    def _blocks_without(self, blocks: list[Block], find: Callable[[Block], object | None]) -> list[Block]:
        return [block for block, found in zip(blocks, _side_by_side(find, blocks), strict=True) if found is None]

    def entry(self, block: Block) -> ShardEntry | None:
        """Return the manifest's row for a shard in the store; None if there is none, or another one has its name.

        It follows from the shard's record; a shard that may have changed since is digested, and its record renewed.
        """
        name = self.stored_name(block)
        record = self.store.unchanged(name) or self.store.renewed(name, partial(self._facts, block))
        if record is None:
            return None
        return ShardEntry(
            name=shard_name(block.view, block.number),
            view=block.view,
            block=block.number,
            rows=block.rows,
            bytes=record.size,
            sha256=record.sha256,
            statuses=record.facts["statuses"],
        )

    def _facts(self, block: Block, path: Path) -> dict[str, Any]:
        """Return what the store records of a shard; raises ShardError where another one has its name."""
        attributes = attributes_of(version_of(self.columns), self.fingerprint, block.view, block.number)
        return facts_of(count_statuses(read_columns(path, {"status"} & self.columns.keys(), attributes)))

    def make(self, search: TeacherSearch, blocks: list[Block], workers: int = 1) -> Iterator[Block]:
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
            yield from self._make_in_turn(search, blocks)
        else:
            return_freed_memory()  # which each fork would have again
            for number in run_in_forks([partial(self._make_one, search, block) for block in blocks], workers):
                yield blocks[number]

    def _make_in_turn(self, search: TeacherSearch, blocks: list[Block]) -> Iterator[Block]:
        """Make shards in this process, on a GPU some at once; while they are searched, a thread writes those before."""
        size = shards_at_once(search, self.attack, self.train)
        groups = [blocks[start : start + size] for start in range(0, len(blocks), size)]
        waiting: deque[tuple[Block, Future[None]]] = deque()
        with ThreadPoolExecutor(1) as writer:
            try:
                for group in groups:
                    for block, values in zip(group, self._joint_values(search, group), strict=True):
                        with interrupts_wait():  # one that comes between two locks of the pool would leave them closed
                            waiting.append((block, writer.submit(self.keep, block, values)))
                    while len(waiting) > size:
                        yield _written(waiting)
                while waiting:
                    yield _written(waiting)
            finally:
                for _, shard in waiting:
                    shard.cancel()

    def _joint_values(self, search: TeacherSearch, blocks: list[Block]) -> list[dict[str, NDArray[Any]]]:
        if len(blocks) == 1:
            return [self.values(search, blocks[0])]
        return joint_values(search, self.train, blocks, self.views, self.attack)

    def _make_one(self, search: TeacherSearch, block: Block, slot: int = 0) -> None:
        self.keep(block, self.values(search, block))

    def values(self, search: TeacherSearch, block: Block) -> dict[str, NDArray[Any]]:
        """Search, and return the columns of a shard."""
        return shard_values(search, self.train, block, self.views, self.attack)

    def keep(self, block: Block, values: dict[str, NDArray[Any]]) -> None:
        """Write a shard's columns into the store, to stay, with its record, from which it is published."""
        name = self.stored_name(block)
        path = self.store.path(name)
        self.write(path, block, values)
        self.store.seal(name, self._facts(block, path))
        return_freed_memory()

    def write(self, path: Path, block: Block, values: dict[str, NDArray[Any]]) -> None:
        """Write a shard's columns to a file."""
        write_shard(
            path,
            values,
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
            format_version=version_of(self.columns),
            fingerprint=self.fingerprint,
            columns=self.columns,
            parameters=self.parameters,
            class_names=list(train.class_names),
            image_shape=train.view_shape,
            mean=list(train.mean),
            std=list(train.std),
            augmentation=Augmentation(**self.parameters["augmentation"]),
            digests=self.digests,
            rows=len(train.labels),
            views=self.attack.views,
            targets=self.attack.targets,
            shards=entries,
            totals=totals_of(entries, self.attack.targets),
        )

    def publish(self, directory: Path, card: Card = EMPTY_CARD) -> Manifest:
        """Link the shards of this dataset into a directory, with its card, the manifest last; replaces what is there.

        Raises:
            ShardError: the store lacks a shard.
        """
        with atomic_directory(directory, *DATASET_FILES, beside=CARD_FILES) as temporary:
            entries = _side_by_side(partial(self._publish_one, temporary), self.blocks)
            manifest = self.manifest(entries)
            write_card(temporary, manifest, card)
            write_atomically(temporary / MANIFEST, manifest_text(manifest))
        return manifest

    def _publish_one(self, directory: Path, block: Block) -> ShardEntry:
        """Link a shard into a directory; returns the manifest's row for it."""
        path, entry = self.store.path(self.stored_name(block)), self.entry(block)
        if entry is None:
            raise ShardError(f"{path}: missing, run the attack again")
        link_file(path, directory / entry.name)
        return entry


def shards_at_once(search: TeacherSearch, attack: Attack, train: Prepared) -> int:
    """Return how many shards are searched together: several on a GPU, as many as its free memory is sure to take."""
    if search.device.type == "cpu" or search.search.draws or not attack.targets:
        return 1
    samples = attack.rows_per_shard * attack.targets
    state = samples * prod(train.view_shape) * SEARCH_BYTES
    free = torch.cuda.mem_get_info(search.device)[0]
    return max(1, min(SHARDS_AT_ONCE, int(SEARCH_SHARE * free) // state))


def _written(waiting: deque[tuple[Block, Future[None]]]) -> Block:
    """Return the block whose shard waits longest, when it is in the store."""
    block, shard = waiting[0]
    shard.result()
    waiting.popleft()
    return block


def make_samples(dataset: SampleDataset, teacher: Classifier, params: Params, blocks: list[Block]) -> Iterator[Block]:
    """Make shards in the store, on this machine; yields each when it is there to stay.

    Args:
        dataset: whose shards they are.
        teacher: that it was described with.
        params: how to search, and the machine.
        blocks: which shards.

    Raises:
        WorkerError: a fork was killed.
    """
    if not blocks:
        return  # to fold a network takes a second
    device = set_up_device(params.runtime)
    with one_cpu_thread():  # forks may follow
        search = search_of(teacher, params.search, search_batch(params.runtime, device), device)
    yield from dataset.make(search, blocks, side_by_side(params.runtime, device))


def _side_by_side(function: Callable[[Block], Result], blocks: list[Block]) -> list[Result]:
    """Return results of a function that waits for files, or digests them, of some blocks: in threads."""
    with ThreadPoolExecutor() as pool:
        try:
            with interrupts_wait():  # one that comes between two locks of the pool would leave its threads waiting
                results = pool.map(function, blocks)
            return list(results)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
