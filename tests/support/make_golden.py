"""Makes the golden datasets of the current format version: python -m tests.support.make_golden DIRECTORY.

They are made once for a version and then kept as they are; tests/shards/test_golden.py says that they stay readable.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from pipeline.shards.file import read_columns
from pipeline.shards.manifest import read_manifest
from tests.support.helpers import attack_parameters, make_shards, random_prepared, tiny_resnet

KINDS = {
    "plain": {"views": 2, "targets": 2, "rows_per_shard": 4},
    "gzip": {"views": 1, "targets": 1, "rows_per_shard": 6, "compression": "gzip", "embed_images": False},
}


def digests_of(directory):
    """The sha256 of every column of every shard, little-endian and row-first."""
    manifest = read_manifest(directory)
    return {
        shard.name: {
            name: hashlib.sha256(values.astype(manifest.columns[name].dtype).tobytes()).hexdigest()
            for name, values in read_columns(directory / shard.name, sorted(manifest.columns)).items()
        }
        for shard in manifest.shards
    }


def main(out):
    torch.set_num_threads(1)
    teacher = tiny_resnet(0, shape=(1, 4, 5))
    train = random_prepared(0, 6, shape=(1, 4, 5), model=teacher)
    for kind, changes in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            shards = make_shards(Path(folder), train, teacher, attack_parameters(**changes))
            shutil.copytree(shards, out / kind)
    (out / "columns.json").write_text(json.dumps({kind: digests_of(out / kind) for kind in KINDS}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
