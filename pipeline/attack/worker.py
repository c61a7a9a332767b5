"""Making shards on the workers of a cluster: paths and a block in, a finished shard in the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.attack.columns import Block
from pipeline.attack.dataset import SampleDataset
from pipeline.core.errors import WorkerError
from pipeline.core.parameters import Params, check_params, for_workers
from pipeline.core.store import Store
from pipeline.images.prepared import read_prepared
from pipeline.machine.cluster import on_workers
from pipeline.machine.device import search_batch, set_up_device
from pipeline.networks.loading import load_with_digest
from pipeline.search.table import search_of
from pipeline.search.teacher_search import TeacherSearch

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """What a worker needs to make any shard of a dataset."""

    params: str
    """All parameters as JSON."""
    train: Path
    """The prepared training split; paths are absolute."""
    teacher: Path
    store: Path
    fingerprint: str
    """Of the dataset, as the client sees it."""


def make_on_workers(
    client: Client,
    params: Params,
    train: Path,
    teacher: Path,
    dataset: SampleDataset,
    blocks: list[Block],
    say: Callable[[str], None],
) -> Iterator[tuple[Block, bool]]:
    """Make shards as `SampleDataset.make` does, on the workers of a cluster: the same bytes, in any order.

    Args:
        client: of the cluster.
        params: all of them.
        train: the prepared training split.
        teacher: its weights.
        dataset: whose shards they are.
        blocks: which shards; of those that the store has, workers digest what may have changed.
        say: is told when the cluster has no workers.

    Yields:
        a shard when it is in the store to stay, and whether it was made.
    """
    absent = {block for block in blocks if not dataset.store.path(dataset.stored_name(block)).exists()}
    job = ShardJob(
        params=for_workers(params),
        train=train.absolute(),
        teacher=teacher.absolute(),
        store=dataset.store.root.absolute(),
        fingerprint=dataset.fingerprint,
    )
    for block, made in on_workers(client, partial(make_shard, job), blocks, say):
        yield block, made or block in absent  # a worker may have made it, and died before it could tell


def make_shard(job: ShardJob, block: Block) -> tuple[Block, bool]:
    """Make one shard, on a worker, unless the store has it; returns whether it was made.

    Raises:
        WorkerError: the worker has other files or other code than the client.
    """
    dataset, search = _loaded(job)
    lacks = dataset.entry(block) is None
    if lacks:
        list(dataset.make(search, [block]))
    return block, lacks


@lru_cache(maxsize=1)
def _loaded(job: ShardJob) -> tuple[SampleDataset, TeacherSearch]:
    """Load what makes shards, once for each worker process."""
    params = check_params(json.loads(job.params), "the client's parameters")
    device = set_up_device(params.runtime)
    train = read_prepared(job.train)
    teacher = load_with_digest(job.teacher, train, "teacher")
    dataset = SampleDataset.of(train, params, teacher, Store(job.store))
    if dataset.fingerprint != job.fingerprint:
        raise WorkerError(
            f"a worker has other code or other files ({job.train}, {job.teacher}) than this machine: restart it"
        )
    return dataset, search_of(teacher.model, params.search, search_batch(params.runtime, device), device)
