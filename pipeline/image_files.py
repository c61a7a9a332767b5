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
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from pipeline.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")


class ImageFiles(NamedTuple):
    """Image files by name, the parts of which are joined by slashes."""

    names: list[str]
    """Sorted."""
    open: Callable[[str], BinaryIO]
    """Opens a file by name, from any thread."""


@contextlib.contextmanager
def image_files(path: Path, scratch: Path) -> Iterator[ImageFiles]:
    """The image files of a folder, or of a .tar, .tar.gz or .zip file.

    Args:
        path: the folder or archive.
        scratch: folder in which a compressed tar archive is unpacked into a plain one, for as long as this is open.

    Raises:
        DataError: the path is missing or no archive, or a member is a link or leaves the archive's folder.
    """
    if path.is_dir():
        yield ImageFiles(sorted(_names_below(path)), lambda name: open(path / name, "rb"))  # noqa: SIM115 (closed with the image)
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
        yield files


def _names_below(path: Path) -> Iterator[str]:
    for folder, _, files in os.walk(path, followlinks=True):
        for file in files:
            name = Path(folder, file).relative_to(path).as_posix()
            if _is_image(name):
                yield name


def _is_image(name: str) -> bool:
    """An image by its suffix, and not one of the hidden files that other systems leave behind."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return name.lower().endswith(IMAGE_SUFFIXES) and not hidden


def _safe(archive: Path, name: str, is_link: bool) -> str:
    """The plain name of an archive's member, refused when it leads anywhere else."""
    path = PurePosixPath(name)
    if is_link:
        raise DataError(f"{archive}: member '{name}' is a link: pack the files themselves (tar --dereference)")
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise DataError(f"{archive}: member '{name}' leaves the archive's folder: refused")
    return str(path)


def _of_zip(path: Path, archive: zipfile.ZipFile) -> ImageFiles:
    members = {}
    for info in archive.infolist():
        name = _safe(path, info.filename, stat.S_ISLNK(info.external_attr >> 16))
        if info.flag_bits & 1:
            raise DataError(f"{path}: member '{name}' is encrypted")
        if not info.is_dir() and _is_image(name):
            members[name] = info
    return ImageFiles(sorted(members), lambda name: io.BytesIO(archive.read(members[name])))


def _of_tar(path: Path, stream: BinaryIO) -> ImageFiles:
    members = {}
    stream.seek(0)
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        for info in archive:
            name = _safe(path, info.name, info.issym() or info.islnk())
            if info.isreg() and _is_image(name):
                members[name] = (info.offset_data, info.size)

    def read(name: str) -> BinaryIO:
        offset, size = members[name]
        return io.BytesIO(os.pread(stream.fileno(), size, offset))

    return ImageFiles(sorted(members), read)
