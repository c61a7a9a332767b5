"""Making shards on the workers of a cluster: paths and a block in, a finished shard in the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.attack import Block, Search
from pipeline.attack_run import SampleDataset
from pipeline.cluster import on_workers
from pipeline.config import Params, check_params
from pipeline.data import read_prepared
from pipeline.errors import WorkerError
from pipeline.runtime import choose_device, search_batch
from pipeline.storage import Store
from pipeline.teacher import load_with_digest

if TYPE_CHECKING:
    from distributed import Client


class Job(NamedTuple):
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
) -> Iterator[Block]:
    """As `SampleDataset.make`, on the workers of a cluster: the same bytes, in any order."""
    job = Job(
        params.model_dump_json(),
        train.absolute(),
        teacher.absolute(),
        dataset.store.root.absolute(),
        dataset.fingerprint,
    )
    yield from on_workers(client, partial(make_shard, job), blocks, say)


def make_shard(job: Job, block: Block) -> Block:
    """Make one shard, on a worker.

    Raises:
        WorkerError: the worker has other files or other code than the client.
    """
    dataset, search = _loaded(job)
    if dataset.stored(block) is None:  # else a worker made it, and died before it could tell
        list(dataset.make(search, [block]))
    return block


@lru_cache(maxsize=1)
def _loaded(job: Job) -> tuple[SampleDataset, Search]:
    """Once for each worker process."""
    params = check_params(json.loads(job.params), "the client's parameters")
    device = choose_device(params.runtime)
    train = read_prepared(job.train)
    teacher, digest = load_with_digest(job.teacher, train, "teacher")
    dataset = SampleDataset(train, params.dataset, params.attack, digest, Store(job.store))
    if dataset.fingerprint != job.fingerprint:
        raise WorkerError(
            f"a worker has other code or other files ({job.train}, {job.teacher}) than this machine: restart it"
        )
    return dataset, Search(teacher, params.attack, params.dataset, device, search_batch(params.runtime, device))
