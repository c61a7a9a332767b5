"""The private store of finished work, and locks.

The store (`.work/`) keeps finished pieces of long work by fingerprint: DVC deletes a stage's outputs before it runs
the stage, so what a stage wants to find again must be somewhere else. Nothing in the store is trusted without its
digest, or a record that the file is the one that was digested.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from pipeline.core.errors import PipelineError
from pipeline.core.files import _remove, _write_errors, file_digest, write_atomically

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)  # of network file systems


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


class Record(NamedTuple):
    """What is known of a stored file, and by what it is known again."""

    sha256: str
    name: str
    """By which it was stored."""
    size: int
    """Bytes."""
    mtime_ns: int
    inode: int
    facts: dict[str, Any]
    """What its owner wants to know without reading the file."""


class Store:
    """Finished files by name, each with a record beside it: its sha256, and by what the file is known again.

    `name` is a relative path that starts with a fingerprint, so a file is found only by those who ask for the same
    content. A file whose digest does not fit is removed and counts as absent.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        return self.root / name

    def unchanged(self, name: str) -> Record | None:
        """Return the record of a stored file of the recorded size, time and inode, or None; its bytes are not read.

        A file that was written within the tick of the clock in which its record was may have changed after that, and is
        not taken as unchanged.
        """
        path = self.path(name)
        with contextlib.suppress(OSError, ValueError, TypeError):
            digest, _, known = _record_path(path).read_text(encoding="utf-8").partition("\n")
            record = Record(digest, **json.loads(known))
            if (
                record == self._seen(name, digest, record.facts)
                and record.mtime_ns < _record_path(path).stat().st_mtime_ns
            ):
                return record
        return None

    def find(self, name: str) -> Path | None:
        """Return the path of a stored file whose digest fits, or None."""
        return self.path(name) if self._digested(name) else None

    def renewed(self, name: str, facts_of: Callable[[Path], dict[str, Any]]) -> Record | None:
        """Return the record of a stored file whose digest fits, made anew, or None.

        Args:
            name: of the file.
            facts_of: returns the facts to record of it, which are JSON; raises a PipelineError of a file that is not
                what its name says, which then counts as absent.
        """
        record = self._digested(name)
        if record is None:
            return None
        try:
            record = record._replace(facts=facts_of(self.path(name)))
        except PipelineError:
            _forget(self.path(name))
            return None
        _write_record(self.path(name), record)
        return record

    def seal(self, name: str, facts: dict[str, Any] | None = None) -> Path:
        """Declare the file at `path(name)` finished; record its digest, and facts of it, which are JSON."""
        path = self.path(name)
        seen = self._seen(name, "", facts or {})  # first: a change while it is digested is one
        _write_record(path, seen._replace(sha256=file_digest(path)))
        return path

    def _seen(self, name: str, digest: str, facts: dict[str, Any]) -> Record:
        """Return the record of a file as it is now."""
        found = self.path(name).stat()
        return Record(digest, name, found.st_size, found.st_mtime_ns, found.st_ino, facts)

    def _digested(self, name: str) -> Record | None:
        """Return what is seen of a file whose digest fits, without facts, or None."""
        path = self.path(name)
        recorded = _record_path(path)
        if not path.is_dir() and not (path.exists() and recorded.exists()):
            return None  # absent, or not finished: whoever makes it replaces what is there
        with contextlib.suppress(OSError):
            if path.is_file() and recorded.is_file():
                seen = self._seen(name, recorded.read_bytes().partition(b"\n")[0].decode("ascii", "replace"), {})
                if file_digest(path) == seen.sha256:
                    return seen
        _distrust(path)
        _forget(path)
        return None

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


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _write_record(path: Path, record: Record) -> None:
    """Write the record of a file beside it: a line with the digest, and one of JSON with all else."""
    known = {field: value for field, value in record._asdict().items() if field != "sha256"}
    write_atomically(_record_path(path), f"{record.sha256}\n{json.dumps(known, sort_keys=True)}\n")


def _distrust(path: Path) -> None:
    """Let DVC's cache, which may have a damaged file by another name, digest it: what nobody may write, it trusts."""
    with contextlib.suppress(OSError):
        if path.is_file():
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


def _forget(path: Path) -> None:
    with _write_errors(path):
        _remove(path)
        _remove(_record_path(path))
