"""HDF5 files that are written whole: what decides their bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import h5py

from pipeline.core.files import write_atomically


@contextlib.contextmanager
def written_hdf5(path: Path) -> Iterator[h5py.File]:
    """Yield an HDF5 file in memory; on success write it to `path`, atomically.

    HDF5 itself cannot be trusted with a full disk: it fails again, and crashes, when it closes its files.
    """
    with h5py.File(path.name, "w", driver="core", backing_store=False, libver=("v108", "v108")) as file:
        yield file
        file.flush()
        content = file.id.get_file_image()
    write_atomically(path, content)
