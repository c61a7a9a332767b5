"""Makes the golden datasets of a format version: python -m tests.support.make_golden VERSION DIRECTORY.

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
from tests.support.helpers import (
    attack_parameters,
    in_memory,
    make_shards,
    random_prepared,
    tiny_resnet,
    view_parameters,
)

PLAIN = {"views": 2, "targets": 2, "rows_per_shard": 4}
WITHOUT_IMAGES = {"views": 1, "targets": 1, "rows_per_shard": 6, "compression": "gzip", "embed_images": False}
LOGITS_ALONE = WITHOUT_IMAGES | {"targets": 0, "compression": "none", "logits": "float16", "features": True}
# By version: kinds of datasets, each with what it changes of the attack's parameters.
KINDS = {
    1: {"plain": PLAIN, "gzip": WITHOUT_IMAGES},
    2: {"plain": PLAIN, "gzip": WITHOUT_IMAGES, "logits": LOGITS_ALONE},
}
SHAPES = {1: (1, 4, 5), 2: (3, 4, 5)}  # of views
VIEWS = {
    1: view_parameters(),
    2: view_parameters(padding=0, scale=(0.2, 1.0), ratio=(0.5, 2.0), jitter=(0.4, 0.4, 0.4)),
}


def golden_teacher(version):
    return tiny_resnet(0, shape=SHAPES[version])


def golden_images(version):
    """Six images, in version 2 larger than views."""
    teacher = golden_teacher(version)
    if version == 1:
        return random_prepared(0, 6, shape=SHAPES[1], model=teacher)
    larger = random_prepared(0, 6, shape=(3, 8, 9))._replace(view_size=(4, 5))
    labels = teacher(torch.from_numpy(larger.centred()).float() / 255).argmax(1).numpy()
    return in_memory(larger.images, labels, larger.class_names, larger.mean, larger.std)._replace(view_size=(4, 5))


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


def main(version, out):
    torch.set_num_threads(1)
    for kind, changes in KINDS[version].items():
        with tempfile.TemporaryDirectory() as folder:
            parameters = attack_parameters(**changes)
            shards = make_shards(
                Path(folder), golden_images(version), golden_teacher(version), parameters, VIEWS[version]
            )
            shutil.copytree(shards, out / kind)
    digests = {kind: digests_of(out / kind) for kind in KINDS[version]}
    (out / "columns.json").write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
