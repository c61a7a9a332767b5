"""Files that are whole or absent, digests, and the private store of finished work.

The store (`.work/`) keeps finished pieces of long work by fingerprint: DVC deletes a stage's outputs before it runs
the stage, so what a stage wants to find again must be somewhere else. Nothing in the store is trusted without its
digest.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from pipeline.core.errors import StoreError, shown

if TYPE_CHECKING:
    import h5py

CANNOT_BE_WRITTEN = {
    getattr(errno, name)
    for name in (
        "EACCES",
        "ENAMETOOLONG",
        "EPERM",
        "EROFS",
        "ENOTDIR",
        "EISDIR",
        "ELOOP",
        "EEXIST",
        "ENOTEMPTY",
        "EBUSY",
        "EIO",
    )
}
COPIED_BYTES = 1 << 30  # at a time; the file system shares blocks where it can


def local_path(place: Path | str) -> Path:
    """Return a path as people and programs write it: `~` is the home folder, and file:///a%20b is /a b.

    Example:
        >>> local_path("file:///data/a%20b")
        PosixPath('/data/a b')
    """
    text = os.fspath(place)
    if text.startswith(("file:///", "file://localhost/")):
        text = unquote(text.removeprefix("file://").removeprefix("localhost"))
    text = os.path.expanduser(text)  # Path.expanduser fails where there is no such home
    return Path(os.fsdecode(text.encode("utf-8", "surrogateescape")))  # of a file, perhaps under a locale of ASCII


def as_utf8(text: str) -> str:
    """Return a name or an argument that the system gave as it is under a locale of UTF-8, whatever the locale."""
    return os.fsencode(text).decode("utf-8", "surrogateescape")


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Say in one line which path cannot be written, and why."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(existing_parent(path)).free
            raise StoreError(f"{path}: no space to write it ({free / 1e6:.0f} MB free): {error.strerror}") from error
        if error.errno in CANNOT_BE_WRITTEN:
            raise StoreError(f"{path}: cannot be written: {error.strerror}") from error
        raise


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it to `path`.

    A reader sees the old file or the whole new one. When the body fails, the temporary file goes and `path` is as it
    was.

    Raises:
        StoreError: the file cannot be written (disk full, no permission); names path and reason.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with _write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a whole file, or leave the old one as it was."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON with sorted keys; refuses NaN."""
    write_atomically(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def reserve(path: Path, size: int) -> None:
    """Take so many bytes of disk for a file that is about to be written, to fail now rather than half way."""
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, size))


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


@contextlib.contextmanager
def atomic_directory(path: Path, *owned: str, beside: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success it takes the place of `path`.

    One process at a time may do this for a path (hold a lock). What a killed one left is cleared away first. Of a
    symbolic link, the folder that it leads to is replaced. A folder that cannot be renamed, as one of a container's
    image, is copied aside and removed: for that moment, nothing whole is at `path`.

    Args:
        path: the folder.
        owned: patterns of names that are written; a folder that holds anything else is not replaced.
        beside: names that others use as well; a folder of nothing else is not replaced either.

    Raises:
        StoreError: the folder cannot be written, or is somebody else's; names path and reason.
    """
    check_replaceable(path, *owned, beside=beside)
    place = path.resolve()
    new, old = (place.with_name(f".{place.name}.{state}.tmp") for state in ("new", "old"))
    try:
        with _write_errors(path):
            if old.is_dir() and not place.exists():
                os.rename(old, place)
            for leftover in (new, old):
                _remove(leftover)
            new.mkdir(parents=True)
            yield new
            if place.exists():
                _set_aside(place, old)
            try:
                os.rename(new, place)
            except BaseException:
                if old.exists():
                    os.rename(old, place)
                raise
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _set_aside(path: Path, aside: Path) -> None:
    """Rename a folder; where that cannot be, copy and remove it."""
    try:
        os.rename(path, aside)
    except OSError as error:
        if error.errno != errno.EXDEV:  # what overlayfs says of a folder of a lower layer
            raise
        shutil.copytree(path, aside, symlinks=True)
        shutil.rmtree(path)


def check_replaceable(path: Path, *owned: str, beside: Sequence[str] = ()) -> None:
    """Refuse a folder that `atomic_directory` could not replace: call it before long work.

    Raises:
        StoreError: it is no folder, a mount point, or holds something of somebody else; names path and reason.
    """
    with _write_errors(path):
        if path.is_symlink() and not path.exists():
            raise StoreError(f"{path}: is a symbolic link that leads nowhere")
        if path.exists() and not path.is_dir():
            raise StoreError(f"{path}: is no folder: remove it, or choose another one")
        if os.path.ismount(path):
            raise StoreError(f"{path}: is a mount point, which cannot be replaced: choose a folder in it")
        entries = list(path.iterdir()) if path.is_dir() else []
        names = [entry.name for entry in entries]
        folders = {entry.name for entry in entries if entry.is_dir() and not entry.is_symlink()}
        patterns = (*owned, "*.tmp")
        others = [name for name in names if name in folders or not any(fnmatch(name, each) for each in patterns)]
        if len(others) < len(names):
            others = [name for name in others if name not in beside]
        if others:
            raise StoreError(f"{path}: holds '{shown(min(others))}', which is not written here: choose another folder")


def check_apart(out: Path, directories: Sequence[Path]) -> None:
    """Refuse a folder that holds what is read, or is within it.

    Raises:
        StoreError: names the two.
    """
    place = out.resolve()
    for directory in directories:
        source = directory.resolve()
        if place.is_relative_to(source) or source.is_relative_to(place):
            raise StoreError(f"{out}: is, holds or is within what is read here ({directory}): choose another folder")


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, sharing its blocks where the file system can (a reflink).

    Raises:
        StoreError: the source cannot be read, or the target cannot be written.
    """
    try:
        reader = open(source, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise StoreError(f"{source}: cannot be read: {error.strerror}") from error
    with reader, atomic_path(target) as temporary, open(temporary, "wb") as writer:
        try:
            while os.copy_file_range(reader.fileno(), writer.fileno(), COPIED_BYTES):
                pass
        except OSError:  # between file systems, on older kernels
            for file in (reader, writer):
                file.seek(0)
            shutil.copyfileobj(reader, writer, 1 << 20)


def link_file(source: Path, target: Path) -> None:
    """Give a file that nobody changes in its place a second name, or copy it where the file systems cannot.

    Both names are of one file, which takes its bytes once; a copy shares its blocks where it can.

    Args:
        source: the file, or a link to it.
        target: the new name; a file that has it is replaced.

    Raises:
        StoreError: the source cannot be read, or the target cannot be written.
    """
    with _write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another device, no permission, too many links, a file system without any
        copy_file(source, target)


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_hdf5(path: Path | str) -> h5py.File:
    """Open an HDF5 file for reading.

    HDF5 would lock it, which network file systems may refuse; there is no need, as no file is changed in its place.
    """
    import h5py  # imported here: slow

    return h5py.File(path, "r", locking=False)
