"""The private store of finished work, and locks.

The store (`.work/`) keeps finished pieces of long work by fingerprint: DVC deletes a stage's outputs before it runs
the stage, so what a stage wants to find again must be somewhere else. Nothing in the store is trusted without its
digest.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.core.files import _remove, _write_errors, file_digest, write_atomically

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)  # of network file systems
COPIES = 3  # of published shards: in the store, in their folder, in DVC's cache, unless the disk shares them


@contextlib.contextmanager
def lock(path: Path, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock file; while another process has it, wait, telling once who that is.

    On a file system without locks nothing is held, and that is told.

    Args:
        path: the lock file; it holds the process id of its owner.
        on_wait: is told the reason before a wait.

    Raises:
        StoreError: the lock file cannot be written.
    """
    owner = path.with_suffix(".pid")
    file_lock = FileLock(path)
    try:
        with _write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file_lock.acquire(timeout=0)
    except Timeout:
        pid = owner.read_text(encoding="utf-8") if owner.is_file() else "unknown"
        on_wait(f"{path} is held by process {pid}: waiting for it")
        file_lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        on_wait(f"{path}: this file system has no locks ({error.strerror}): run one command at a time here")
    try:
        with _write_errors(owner):
            owner.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        file_lock.release()


class Store:
    """Finished files by name, each with its sha256 beside it.

    `name` is a relative path that starts with a fingerprint, so a file is found only by those who ask for the same
    content. A file whose digest does not fit is removed and counts as absent.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        return self.root / name

    def find(self, name: str) -> Path | None:
        """Return the path of a stored file whose digest fits, or None."""
        path = self.path(name)
        recorded = _digest_path(path)
        if not path.is_dir() and not (path.exists() and recorded.exists()):
            return None  # absent, or not finished: whoever makes it replaces what is there
        with contextlib.suppress(OSError):
            if path.is_file() and recorded.is_file() and recorded.read_bytes() == file_digest(path).encode():
                return path
        _forget(path)
        return None

    def digest(self, name: str) -> str:
        """Return the sha256 that was recorded of a stored file."""
        return _digest_path(self.path(name)).read_text(encoding="utf-8")

    def seal(self, name: str) -> Path:
        """Declare the file at `path(name)` finished."""
        path = self.path(name)
        write_atomically(_digest_path(path), file_digest(path))
        return path

    def sweep(self, folder: str) -> None:
        """Remove what killed processes left of files that they were writing into a folder of the store.

        Nobody else may be writing there: hold a lock.
        """
        for leftover in (self.root / folder).glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def prune(self, keep: Iterable[str]) -> int:
        """Remove all files but those of these names; returns how many were removed."""
        kept = {self.path(name) for name in keep}
        files = [path for path in self.root.rglob("*") if path.is_file()]
        unwanted = {path.with_suffix("") if path.suffix == ".sha256" else path for path in files} - kept
        for path in unwanted:
            _forget(path)
        for folder in self.root.glob("*"):
            with contextlib.suppress(OSError):  # not empty: in use
                folder.rmdir()
        return len(unwanted)


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _forget(path: Path) -> None:
    with _write_errors(path):
        _remove(path)
        _remove(_digest_path(path))
