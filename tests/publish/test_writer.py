"""Compressed columns: smaller than HDF5 makes them, and read by any HDF5."""

import h5py
import numpy as np
import pytest

from pipeline.publish.writer import write_shard
from pipeline.shards.format import Column


def write(path, columns):
    given = {
        "index": np.arange(84, dtype=np.uint32),
        "crop": np.zeros((84, 2), np.int16),
        "teacher_logits": np.zeros((84, 2), np.float32),
        "target": np.zeros((84, 1), np.int16),
    } | columns
    known = {name: Column(str(values.dtype), values.shape[1:], "") for name, values in given.items()}
    write_shard(path, given, known, fingerprint="0" * 64, view=0, block=0, compression="gzip")


@pytest.mark.parametrize("dtype", ["int8", "float32", "int64"])
@pytest.mark.parametrize("rows_of_bytes", [16, 3072, 200_000])
def test_columns_are_read_by_plain_h5py(tmp_path, dtype, rows_of_bytes):
    shape = (84, rows_of_bytes // np.dtype(dtype).itemsize)
    values = np.random.default_rng(0).integers(-9, 9, shape).astype(dtype)
    write(tmp_path / "shard.h5", {"values": values})
    with h5py.File(tmp_path / "shard.h5") as file:
        np.testing.assert_array_equal(file["values"][:], values)
        np.testing.assert_array_equal(file["values"][17:33], values[17:33])
        assert file["values"].compression == "gzip"
        assert file["values"].shuffle


def test_noise_takes_hardly_more_than_its_entropy_and_repetition_next_to_nothing(tmp_path):
    noise = np.rint(np.random.default_rng(0).normal(0, 3, (84, 3072))).clip(-15, 15).astype(np.int8)
    write(tmp_path / "shard.h5", {"noise": noise, "same": np.tile(noise[:1], (84, 1))})
    shares = np.unique(noise, return_counts=True)[1] / noise.size
    entropy = -(shares * np.log2(shares)).sum() / 8 * noise.size
    with h5py.File(tmp_path / "shard.h5") as file:
        assert file["noise"].id.get_storage_size() < 1.03 * entropy
        assert file["same"].id.get_storage_size() < 0.1 * entropy
