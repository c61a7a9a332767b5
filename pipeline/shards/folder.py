"""Bytes of files here or elsewhere: the same few calls for a path and for a URL of any file system of fsspec."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import h5py

from pipeline.core.errors import ShardError
from pipeline.core.files import local_path, read_hdf5
from pipeline.core.text import LFS_POINTER, LFS_SIGNATURE

SMALLEST_SHARD = 512  # bytes; a pointer of Git LFS has fewer
DIGEST_BLOCK = 1 << 20  # bytes in memory while a file is digested
METADATA_BLOCK = 1 << 16  # bytes that HDF5 reads of a remote file at a time


class ByteSource(Protocol):
    """An open file."""

    size: int
    """Bytes."""

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill a view of bytes from an offset on; returns how many bytes there were."""

    def hdf5(self) -> contextlib.AbstractContextManager[h5py.File]:
        """Return the file as HDF5, for its metadata."""

    def close(self) -> None:
        """Give the handle back; may be called again."""


class LocalBytes:
    """A file of this machine's file systems; it is closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would be waited for
        self._closing = weakref.finalize(self, os.close, self._handle)
        self._closing.atexit = False  # a process that ends closes its files, whatever Python has taken down by then
        found = os.fstat(self._handle)
        self.size = found.st_size
        if not stat.S_ISREG(found.st_mode):
            self.close()
            raise OSError("it is no regular file")

    def read_into(self, view: memoryview, offset: int) -> int:
        done = 0  # a call reads 2 GiB at most
        while done < len(view) and (count := os.preadv(self._handle, [view[done:]], offset + done)):
            done += count
        return done

    @contextlib.contextmanager
    def hdf5(self) -> Iterator[h5py.File]:
        with read_hdf5(f"/proc/self/fd/{self._handle}") as file:  # this file, whatever its path leads to now
            yield file

    def close(self) -> None:
        self._handle = -1  # the number may soon be another file's
        self._closing()


class RemoteBytes:
    """A file behind a URL: what is asked for is fetched, and nothing is kept."""

    def __init__(self, folder: RemoteFolder, name: str) -> None:
        self.folder, self.path = folder, folder.path_of(name)
        with _as_os_error():
            size = folder.file_system().size(self.path)
        if size is None:
            raise OSError("the server does not say how large the file is: copy the folder here")
        self.size = int(size)

    def read_into(self, view: memoryview, offset: int) -> int:
        end = min(self.size, offset + len(view))
        with _as_os_error():
            content = self.folder.file_system().cat_file(self.path, start=offset, end=end) if offset < end else b""
        if len(content) != max(0, end - offset):
            raise OSError("the server does not answer range requests: copy the folder here")
        view[: len(content)] = content
        return len(content)

    @contextlib.contextmanager
    def hdf5(self) -> Iterator[h5py.File]:
        with _as_os_error():
            stream = self.folder.file_system().open(self.path, "rb", block_size=METADATA_BLOCK)
        with stream, h5py.File(stream, "r") as file:
            yield file

    def close(self) -> None:
        pass


class LocalFolder:
    """A folder of this machine's file systems."""

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def open(self, name: str) -> ByteSource:
        """Open a file; raises OSError."""
        return _no_pointer(LocalBytes(self.path / name))


class RemoteFolder:
    """A folder behind a URL."""

    is_remote = True

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._file_system: Any = None
        self._process = -1
        self.file_system()

    def __str__(self) -> str:
        return self.url

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file_system": None, "_process": -1}

    def file_system(self) -> Any:
        """Return the file system of fsspec: another one in every process, since connections do not survive a fork."""
        if self._process != os.getpid():
            try:
                from fsspec.core import url_to_fs

                self._file_system, self._root = url_to_fs(self.url)
            except (ImportError, ValueError) as error:
                raise ShardError(f"{self.url}: cannot be read ({error}): pip install '.[remote]', or '.[s3]'") from None
            except Exception as error:  # each kind of URL has its own
                raise ShardError(f"{self.url}: cannot be read ({type(error).__name__}: {error})") from None
            self._process = os.getpid()
        return self._file_system

    def path_of(self, name: str) -> str:
        return f"{self._root}/{name}"

    def open(self, name: str) -> ByteSource:
        """Open a file; raises OSError."""
        return _no_pointer(RemoteBytes(self, name))


Folder = LocalFolder | RemoteFolder


def folder_at(place: Path | str) -> Folder:
    """Return a folder by its path (also file://...), or by a URL as s3://bucket/folder or https://host/folder.

    Raises:
        ShardError: fsspec, or its part for that kind of URL, is not installed.
    """
    if isinstance(place, str) and "://" in place and not place.startswith("file://"):
        return RemoteFolder(place)
    return LocalFolder(local_path(place))


def as_folder(place: Path | Folder) -> Folder:
    """Return the folder at a path of this machine, or the folder itself."""
    return LocalFolder(place) if isinstance(place, Path) else place


def _no_pointer(source: ByteSource) -> ByteSource:
    """Return an open file; raises OSError where it is what a repository has in the place of a large file."""
    head = bytearray(len(LFS_SIGNATURE) if source.size < SMALLEST_SHARD else 0)
    source.read_into(memoryview(head), 0)
    if head == LFS_SIGNATURE:
        source.close()
        raise OSError(LFS_POINTER)
    return source


def digest_of(source: ByteSource) -> str:
    """Return the sha256 of an open file, in hexadecimal; raises OSError."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(DIGEST_BLOCK))
    for offset in range(0, source.size, DIGEST_BLOCK):
        digest.update(buffer[: source.read_into(buffer, offset)])
    return digest.hexdigest()


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Raise as OSError what clients of remote file systems raise, which have no common type."""
    try:
        yield
    except ShardError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"not found: {error}") from error
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
