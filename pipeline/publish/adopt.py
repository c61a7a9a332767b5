"""Finished shards in the private store, by the fingerprint of their dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core.files import link_file
from pipeline.core.store import Store
from pipeline.shards.check import check_shard
from pipeline.shards.format import shard_name
from pipeline.shards.manifest import Manifest


def stored_name(fingerprint: str, view: int, block: int) -> str:
    """Return where a shard is kept in the store."""
    return f"{fingerprint}/{shard_name(view, block)}"


def facts_of(statuses: dict[str, int]) -> dict[str, Any]:
    """Return what the store records of a shard: how many of its samples have each status, by name."""
    return {"statuses": statuses}


def adopt_shards(directory: Path, manifest: Manifest, store: Store) -> int:
    """Take the shards of a dataset into the store, so that later runs build on them; returns how many were new.

    Where the disk has hard links, the store shares the files of the dataset.

    Raises:
        ShardError: a shard is not what the manifest says.
    """
    new = 0
    for shard in manifest.shards:
        check_shard(directory, manifest, shard)
        name = stored_name(manifest.fingerprint, shard.view, shard.block)
        if store.find(name) is None:
            link_file(directory / shard.name, store.path(name))
            store.seal(name, facts_of(shard.statuses))
            new += 1
    return new
