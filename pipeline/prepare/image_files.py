"""The image files below a folder or in an archive, each to be opened on its own; nothing is ever extracted.

Names are the same whether the files lie in a folder or in an archive of it, and come in the same order.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

from pipeline.core.errors import DataError, shown
from pipeline.core.files import as_utf8
from pipeline.core.text import LFS_POINTER, LFS_SIGNATURE

# What PIL knows the suffixes of, but are no pictures, or take a program of another kind to draw.
NO_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
# Names that other systems leave behind, beside those that begin with a dot.
LEFT_BEHIND = {"__macosx", "@eadir", "thumbs.db", "desktop.ini"}
UNUSABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
NAMED = 5  # names in a message, at most
LARGEST_MEMBER = 1 << 28  # bytes of a file in an archive: it is read into memory
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")


class ImageFiles(NamedTuple):
    """Image files by name, the parts of which are joined by slashes."""

    names: list[str]
    """Sorted."""
    folders: list[str]
    """All folders, sorted, also those without images."""
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
        DataError: the path is missing or no archive, a member is a link or leaves the archive's folder, or the name of
            an image is not UTF-8 or has control characters.
    """
    if path.is_dir():
        names, folders, notes = _below(path)
        files = _images_among(path, list(names), folders, lambda name: io.BytesIO((path / names[name]).read_bytes()))
        yield files._replace(notes=[*files.notes, *notes])
        return
    if not path.is_file():
        raise DataError(f"{path}: no such folder or archive of images")
    lower = path.name.lower()
    with contextlib.ExitStack() as stack:
        try:
            if lower.endswith(".zip"):
                files = _of_zip(path, stack.enter_context(zipfile.ZipFile(path, metadata_encoding="utf-8")))
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
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: {_not_utf8(repr(error.object)[2:-1])}") from None
        except PermissionError as error:
            raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None
        yield files


def _below(path: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """Return what lies below a folder, each once, however many links lead to it; and what is neither.

    Returns:
        the names by which the system knows regular files, by name in UTF-8; the names of folders; notes.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}")

    names: dict[str, str] = {}
    nowhere: list[str] = []
    folders, again, visited = [], [], set()
    for folder, below, files in os.walk(path, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        place = Path(folder).relative_to(path)
        if (status.st_dev, status.st_ino) in visited:
            below.clear()
            again.append(str(place))
            continue
        visited.add((status.st_dev, status.st_ino))
        below.sort()
        folders.append(as_utf8(place.as_posix()))
        for file in files:
            name = (place / file).as_posix()
            if os.path.isfile(os.path.join(folder, file)):
                names[as_utf8(name)] = name
            else:
                nowhere.append(as_utf8(name))
    notes = [f"passed over: links to folders that are read under another name: {listed(again)}"] if again else []
    nowhere = [name for name in nowhere if _is_image(name)]
    if nowhere:
        notes.append(f"passed over: links that lead nowhere, and special files: {listed(nowhere)}")
    return names, folders[1:], notes


def listed(names: Sequence[str], most: int = NAMED) -> str:
    """Return names for a message: the first ones, and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    first = ", ".join(shown(name) for name in names[:most])
    return first if len(names) <= most else f"{first} and {len(names) - most:,} more"


def _images_among(path: Path, names: list[str], folders: list[str], read: Callable[[str], BinaryIO]) -> ImageFiles:
    """Return the images among files, and how many others there are.

    Raises:
        DataError: the name of an image cannot be told to others.
    """
    images = sorted(name for name in names if _is_image(name))
    for name in images:
        if found := UNUSABLE.search(name):
            if "\ud800" <= found[0] <= "\udfff":
                raise DataError(f"{path}: {_not_utf8(shown(name))}")
            raise DataError(f"{path}: the name '{shown(name)}' has control characters: rename it")
    visible = [name for name in names if not _is_hidden(name)]
    others = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in visible if not _is_image(name))
    kinds = ", ".join(f"{count} of {shown(suffix)}" for suffix, count in sorted(others.items()))
    notes = [f"passed over: files that are no images by their names ({kinds})"] if others else []
    holding = {*folders, *(name.rpartition("/")[0] for name in visible)}
    above = {str(parent) for folder in holding for parent in PurePosixPath(folder, "_").parents} - {"."}
    return ImageFiles(images, sorted(folder for folder in above if not _is_hidden(folder)), read, notes)


def _not_utf8(name: str) -> str:
    return f"the name '{name}' is not UTF-8: rename it, or pack the files again with names in UTF-8"


@functools.cache
def image_kinds() -> dict[str, str]:
    """Return the formats of images that PIL reads here, in its words, by suffix."""
    suffixes = Image.registered_extensions()
    return {suffix: kind for suffix, kind in suffixes.items() if kind in Image.OPEN and kind not in NO_PICTURES}


def open_image(stream: BinaryIO) -> Image.Image:
    """Open an image, of whatever kind it is by its content.

    Raises:
        OSError: it is no image of the kinds that are read.
    """
    try:
        return Image.open(stream, formats=sorted(set(image_kinds().values())))
    except UnidentifiedImageError:
        stream.seek(0)
        if stream.read(len(LFS_SIGNATURE)) == LFS_SIGNATURE:
            raise OSError(LFS_POINTER) from None
        raise


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in image_kinds() and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    """Return whether a file or folder is among the hidden ones that other systems leave behind."""
    return any(part.startswith(".") or part.lower() in LEFT_BEHIND for part in name.split("/"))


def _safe(archive: Path, name: str, is_link: bool, size: int) -> str:
    """Return the plain name of an archive's member, refused when it leads anywhere else or is too large."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{archive}: member '{shown(name)}' leaves the archive's folder: refused")
    if "\\" in name:
        raise DataError(f"{archive}: member '{shown(name)}' has a backslash in its name: pack the files with slashes")
    if is_link and _is_image(name):
        raise DataError(
            f"{archive}: member '{shown(name)}' is a link: pack the files themselves "
            "(tar --dereference --hard-dereference)"
        )
    if size > LARGEST_MEMBER:
        raise DataError(f"{archive}: member '{shown(name)}' has {size / 1e6:.0f} MB: too large for an image")
    return str(path)


def _of_zip(path: Path, archive: zipfile.ZipFile) -> ImageFiles:
    members, folders = {}, []
    for info in archive.infolist():
        is_link = stat.S_ISLNK(info.external_attr >> 16)
        name = _safe(path, info.filename, is_link, info.file_size)
        if info.flag_bits & 1:
            raise DataError(f"{path}: member '{shown(name)}' is encrypted")
        if info.is_dir():
            folders.append(name)
        elif not is_link:
            members[name] = info
    return _images_among(path, list(members), folders, lambda name: io.BytesIO(archive.read(members[name])))


def _of_tar(path: Path, stream: BinaryIO) -> ImageFiles:
    members: dict[str, tuple[int, int, Any]] = {}
    folders, name = [], ""
    stream.seek(0)
    with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8") as archive:
        for info in archive:
            name = _safe(path, info.name, info.issym() or info.islnk(), info.size)
            if info.isreg():
                members[name] = (info.offset_data, info.size, info.sparse)
            elif info.isdir():
                folders.append(name)
    # tarfile takes a damaged header for the end; the real end is a block of zeros.
    if os.pread(stream.fileno(), tarfile.BLOCKSIZE, archive.offset) != bytes(tarfile.BLOCKSIZE):
        raise DataError(f"{path}: not a whole archive: it ends or is damaged after member '{shown(name)}'")

    def read(name: str) -> BinaryIO:
        offset, size, pieces = members[name]
        if pieces is None:
            return io.BytesIO(os.pread(stream.fileno(), size, offset))
        content = io.BytesIO(bytes(size))  # of a sparse file, whose pieces lie one after the other
        for start, length in pieces:
            content.seek(start)
            offset += content.write(os.pread(stream.fileno(), length, offset))
        content.seek(0)
        return content

    return _images_among(path, list(members), folders, read)
