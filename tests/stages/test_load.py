"""A hundred thousand rows in five hundred shards: memory is bounded, and every row has the right bytes."""

import os
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.attack import dataset as attack_dataset
from pipeline.core.provenance import ROOT
from pipeline.core.status import Status
from pipeline.shards.format import columns_of
from pipeline.shards.reader import BoundaryShards
from tests.support.files import sample_dataset
from tests.support.helpers import in_memory, searching, tiny_resnet

pytestmark = pytest.mark.faults

IMAGES, VIEWS, BLOCK = 10_000, 10, 200
SHAPE, CLASSES = (3, 8, 8), 10


def values_of(view, start):
    """Random columns of a block of rows, which follow from view and row: searches that did not converge."""
    generator = np.random.default_rng((view, start))
    values = {}
    for name, column in columns_of(SHAPE, CLASSES, 1, embed_images=True).items():
        shape = (BLOCK, *column.shape)
        if np.issubdtype(column.dtype, np.floating):
            values[name] = generator.random(shape, np.float32)
        else:
            values[name] = generator.integers(0, 100, shape).astype(column.dtype)
    values["index"] = np.arange(start, start + BLOCK, dtype=np.uint32)
    values["label"] %= CLASSES
    values["target"] = ((values["label"][:, None] + 1) % CLASSES).astype(np.int16)
    values["crop"] %= 3
    values["flip"][:] = 0
    values["status"][:] = Status.NOT_CONVERGED
    return values


def found(search, train, block, views, attack):
    """In the place of `shard_values`: what a search would have found."""
    return values_of(block.view, block.start)


def write_all(directory):
    """Write all shards to a store, and publish them."""
    images = np.zeros((IMAGES, *SHAPE), np.uint8)
    names = tuple(map(str, range(CLASSES)))
    train = in_memory(images, np.arange(IMAGES) % CLASSES, names, (0.5,) * 3, (0.25,) * 3)
    changes = {"attack.views": VIEWS, "attack.rows_per_shard": BLOCK, "views.flip": False}
    dataset = sample_dataset(directory, train, changes)
    with mock.patch.object(attack_dataset, "shard_values", found):
        for _ in dataset.make(searching(tiny_resnet(0)), dataset.missing()):
            pass
    dataset.publish(directory / "bss")


STEPS = {
    "write and publish": "from tests.stages.test_load import write_all; write_all(directory)",
    "verify": "from stages.shards import main; main(['verify', str(directory / 'bss')], standalone_mode=False)",
    "read": """
from torch.utils.data import DataLoader
from pipeline.shards.reader import BoundaryShards
shards = BoundaryShards(directory / 'bss')
assert sum(len(batch['label']) for batch in DataLoader(shards, batch_size=256, shuffle=True)) == 100_000
""",
}
PEAK = """
import sys
from pathlib import Path
import tests.stages.test_load
from tests.support.files import tiny_teacher
tiny_teacher()  # torch takes its memory
def resident(name):
    return int(Path('/proc/self/status').read_text().split(name + ':')[1].split()[0]) / 1024
directory, before = Path(sys.argv[1]), resident('VmRSS')
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A directory with the dataset `bss`, and for each step its seconds and how many MiB it needed at most."""
    directory = tmp_path_factory.mktemp("large")
    figures = {}
    for name, step in STEPS.items():
        begin = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-c", f"{PEAK}{step}\nprint(resident('VmHWM') - before)", str(directory)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            text=True,
            capture_output=True,
            timeout=200,
        )
        assert result.returncode == 0, result.stderr
        figures[name] = (time.monotonic() - begin, float(result.stdout.split()[-1]))
    return directory, figures


def test_memory_is_bounded(large):
    directory, figures = large
    size = sum(path.stat().st_size for path in (directory / "bss").glob("*.h5")) / 2**20
    assert size > 50
    for name, (seconds, peak) in figures.items():
        print(f"{name}: {seconds:.1f} s, {peak:.0f} MiB over the imported modules, of {size:.0f} MiB of shards")
        assert peak < 60


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_eight_workers_read_the_right_bytes_in_every_row(large, start):
    shards = BoundaryShards(large[0] / "bss")
    shards[0]  # a file that is open here does not disturb the workers
    loader = DataLoader(shards, batch_size=BLOCK, num_workers=8, multiprocessing_context=start)
    rows = 0
    begin = time.monotonic()
    for number, batch in enumerate(loader):
        view, block = divmod(number, IMAGES // BLOCK)
        expected = values_of(view, block * BLOCK)
        for name, values in expected.items():
            assert np.array_equal(batch[name].numpy(), values), (number, name)
        rows += len(batch["label"])
    assert rows == IMAGES * VIEWS
    print(f"{start}: {rows / (time.monotonic() - begin):.0f} rows/s, of which the workers' start is a part")


def test_workers_that_shuffle_read_every_row_once(large):
    shards = BoundaryShards(large[0] / "bss", verify=False)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(shards, batch_size=500, shuffle=True, generator=generator, num_workers=8)
    seen = np.zeros(IMAGES, np.int64)
    for batch in loader:
        np.add.at(seen, batch["index"].numpy(), 1)
    assert (seen == VIEWS).all()
