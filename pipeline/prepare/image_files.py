"""The image files below a folder or in an archive, each to be opened on its own; nothing is ever extracted.

Names are the same whether the files lie in a folder or in an archive of it, and come in the same order.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from pipeline.core.errors import DataError
from pipeline.core.files import as_utf8

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".gif", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
LARGEST_MEMBER = 1 << 28  # bytes of a file in an archive: it is read into memory
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")


class ImageFiles(NamedTuple):
    """Image files by name, the parts of which are joined by slashes."""

    names: list[str]
    """Sorted."""
    open: Callable[[str], BinaryIO]
    """Opens a file by name, from any thread."""
    notes: Sequence[str] = ()
    """What was passed over, in words."""


@contextlib.contextmanager
def image_files(path: Path, scratch: Path) -> Iterator[ImageFiles]:
    """Yield the image files of a folder, or of a .tar, .tar.gz or .zip file.

    Args:
        path: the folder or archive.
        scratch: folder in which a compressed tar archive is unpacked into a plain one, for as long as this is open.

    Raises:
        DataError: the path is missing or no archive, or a member is a link or leaves the archive's folder.
    """
    if path.is_dir():
        names = {as_utf8(name): name for name in _names_below(path)}
        yield _images_among(list(names), lambda name: io.BytesIO((path / names[name]).read_bytes()))
        return
    if not path.is_file():
        raise DataError(f"{path}: no such folder or archive of images")
    lower = path.name.lower()
    with contextlib.ExitStack() as stack:
        try:
            if lower.endswith(".zip"):
                files = _of_zip(path, stack.enter_context(zipfile.ZipFile(path)))
            elif lower.endswith((".tar.gz", ".tgz")):
                plain = stack.enter_context(tempfile.TemporaryFile(dir=scratch))
                with gzip.open(path) as packed:
                    shutil.copyfileobj(packed, plain, 1 << 20)
                files = _of_tar(path, plain)
            elif lower.endswith(".tar"):
                files = _of_tar(path, stack.enter_context(open(path, "rb")))
            else:
                raise DataError(f"{path}: expected a folder or an archive {', '.join(ARCHIVE_SUFFIXES)}")
        except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: not a whole archive: {error}") from None
        except PermissionError as error:
            raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None
        yield files


def _names_below(path: Path) -> Iterator[str]:
    """Yield regular files, each folder once, however many links lead to it."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}")

    visited = set()
    for folder, folders, files in os.walk(path, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders.sort()
        for file in files:
            if os.path.isfile(os.path.join(folder, file)):
                yield Path(folder, file).relative_to(path).as_posix()


def _images_among(names: list[str], read: Callable[[str], BinaryIO]) -> ImageFiles:
    """Return the images among files, and how many others there are."""
    images = [name for name in names if _is_image(name)]
    visible = [name for name in names if not _is_hidden(name)]
    others = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in visible if not _is_image(name))
    kinds = ", ".join(f"{count} of {suffix}" for suffix, count in sorted(others.items()))
    return ImageFiles(sorted(images), read, [f"passed over: files that are no images ({kinds})"] if others else [])


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    """Return whether a file is among the hidden ones that other systems leave behind."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _safe(archive: Path, name: str, is_link: bool, size: int) -> str:
    """Return the plain name of an archive's member, refused when it leads anywhere else or is too large."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{archive}: member '{name}' leaves the archive's folder: refused")
    if "\\" in name:
        raise DataError(f"{archive}: member '{name}' has a backslash in its name: pack the files with slashes")
    if is_link and _is_image(name):
        raise DataError(
            f"{archive}: member '{name}' is a link: pack the files themselves (tar --dereference --hard-dereference)"
        )
    if size > LARGEST_MEMBER:
        raise DataError(f"{archive}: member '{name}' has {size / 1e6:.0f} MB: too large for an image")
    return str(path)


def _of_zip(path: Path, archive: zipfile.ZipFile) -> ImageFiles:
    members = {}
    for info in archive.infolist():
        is_link = stat.S_ISLNK(info.external_attr >> 16)
        name = _safe(path, info.filename, is_link, info.file_size)
        if info.flag_bits & 1:
            raise DataError(f"{path}: member '{name}' is encrypted")
        if not info.is_dir() and not is_link:
            members[name] = info
    return _images_among(list(members), lambda name: io.BytesIO(archive.read(members[name])))


def _of_tar(path: Path, stream: BinaryIO) -> ImageFiles:
    members, name = {}, ""
    stream.seek(0)
    with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8") as archive:
        for info in archive:
            name = _safe(path, info.name, info.issym() or info.islnk(), info.size)
            if info.isreg():
                members[name] = (info.offset_data, info.size)
    # tarfile takes a damaged header for the end; the real end is a block of zeros.
    if os.pread(stream.fileno(), tarfile.BLOCKSIZE, archive.offset) != bytes(tarfile.BLOCKSIZE):
        raise DataError(f"{path}: not a whole archive: it ends or is damaged after member '{name}'")

    def read(name: str) -> BinaryIO:
        offset, size = members[name]
        return io.BytesIO(os.pread(stream.fileno(), size, offset))

    return _images_among(list(members), read)
