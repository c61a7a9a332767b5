"""HDF5 files: written whole, so that what decides their bytes is here, and read without locks."""

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


def read_hdf5(path: Path | str) -> h5py.File:
    """Open an HDF5 file for reading.

    HDF5 would lock it, which network file systems may refuse; there is no need, as no file is changed in its place.
    """
    return h5py.File(path, "r", locking=False)
