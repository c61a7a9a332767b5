"""Datasets by name and files of images."""

import gzip
import io
import os
import pickle
import subprocess
import tarfile
import threading
import zipfile
from functools import partial
from hashlib import md5
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import scipy.io
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.prepare.datasets import open_dataset
from tests.support.helpers import dataset_parameters

ROWS = 6
PIXELS = np.random.default_rng(0).integers(0, 256, (2 * ROWS, 32, 32, 3), np.uint8)
LABELS = np.arange(ROWS) % 3


def png(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def image_tree(**files):
    """Contents by name: three classes in train and test, or what is given."""
    names = [f"{part}/{label}/{row}.png" for part in ("train", "test") for label in ("bird", "cat") for row in range(3)]
    return files or {name: png(PIXELS[number]) for number, name in enumerate(names)}


def as_folder(path, tree):
    for name, content in tree.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return path


def as_tar(path, tree, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in reversed(tree.items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def as_zip(path, tree):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in reversed(tree.items()):
            archive.writestr(name, content)
    return path


PACKERS = {
    "images": as_folder,
    "images.tar": as_tar,
    "images.tar.gz": partial(as_tar, mode="w:gz"),
    "images.TGZ": partial(as_tar, mode="w:gz"),
    "images.zip": as_zip,
}


def opened(tmp_path, path, name="imagefolder"):
    """Class names, and (labels, pixels) of each part."""
    with open_dataset(dataset_parameters(name=name, path=str(path)), tmp_path) as source:
        parts = {
            part: (list(rows.labels), [np.asarray(rows.image(row)) for row in range(len(rows.labels))])
            for part, rows in source.parts.items()
        }
    return source.class_names, parts


def refused(tmp_path, path, name="imagefolder"):
    with pytest.raises(DataError) as caught:
        opened(tmp_path, path, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("wrapper", ["", "cifar/", "./a/b/"])
@pytest.mark.parametrize("packer", PACKERS)
def test_a_folder_and_its_archives_are_the_same_dataset(tmp_path, packer, wrapper):
    tree = {wrapper + name: content for name, content in image_tree().items()}
    path = PACKERS[packer](tmp_path / packer, tree)
    class_names, parts = opened(tmp_path, path)
    assert class_names == ("bird", "cat")
    assert sorted(parts) == ["test", "train"]
    for number, part in enumerate(("train", "test")):
        labels, images = parts[part]
        assert labels == [0, 0, 0, 1, 1, 1]
        assert np.array_equal(images, PIXELS[6 * number :][:6])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [packer]


@pytest.mark.parametrize("packer", PACKERS)
def test_files_that_are_no_images_are_passed_over(tmp_path, packer):
    extra = {
        "README.md": b"x",
        "train/bird/._0.png": b"x",
        "train/bird/Thumbs.db": b"x",
        "train/bird/@eaDir/0.png": b"x",
        "__MACOSX/train/bird/0.png": b"x",
        "train/.cache/0.png": b"x",
    }
    class_names, parts = opened(tmp_path, PACKERS[packer](tmp_path / packer, image_tree() | extra))
    assert class_names == ("bird", "cat")
    assert len(parts["train"][0]) == 6


@pytest.mark.parametrize("packer", PACKERS)
def test_what_is_passed_over_is_told(tmp_path, packer):
    tree = image_tree() | {"README.md": b"x", "train/bird/a.heic": b"x", "test/0.png": b"x", "train/.hidden.txt": b"x"}
    path = PACKERS[packer](tmp_path / packer, tree)
    with open_dataset(dataset_parameters(name="imagefolder", path=str(path)), tmp_path) as source:
        assert list(source.notes) == [
            "left out: images in no class folder: test (1)",
            "passed over: files that are no images by their names (1 of .heic, 1 of .md)",
        ]


@pytest.mark.parametrize("folders", [("Train", "TEST"), ("training", "testing"), ("TRAIN", "Val")])
def test_split_folders_have_several_names(tmp_path, folders):
    tree = {f"{folder}/{label}/0.png": png(PIXELS[0]) for folder in folders for label in ("a", "b")}
    class_names, parts = opened(tmp_path, as_folder(tmp_path / "images", tree))
    assert class_names == ("a", "b")
    assert len(parts) == 2


def test_parts_without_a_training_part_are_refused(tmp_path):
    tree = {f"{folder}/{label}/0.png": png(PIXELS[0]) for folder in ("val", "test") for label in ("a", "b")}
    assert "no images found" in refused(tmp_path, as_folder(tmp_path / "images", tree))


def test_links_are_followed_but_never_in_circles(tmp_path):
    path = as_folder(tmp_path / "images", image_tree())
    (path / "train/bird/again").symlink_to("..")
    (path / "train/cow").symlink_to(as_folder(tmp_path / "elsewhere", {"0.png": png(PIXELS[0])}))
    class_names, parts = opened(tmp_path, path)
    assert class_names == ("bird", "cat", "cow")
    assert parts["train"][0] == [0, 0, 0, 1, 1, 1, 2]


def test_special_files_are_passed_over(tmp_path):
    path = as_folder(tmp_path / "images", image_tree())
    os.mkfifo(path / "train/bird/9.png")
    assert len(opened(tmp_path, path)[1]["train"][0]) == 6


def test_class_folders_alone_are_the_training_part(tmp_path):
    tree = {f"{label}/deeper/{row}.PNG": png(PIXELS[row]) for label in ("b", "a") for row in range(2)}
    class_names, parts = opened(tmp_path, as_folder(tmp_path / "images", tree))
    assert class_names == ("a", "b")
    assert parts.keys() == {"train"}
    assert parts["train"][0] == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["val", "valid", "validation", "VAL"])
def test_a_validation_folder_is_the_validation_part(tmp_path, name):
    tree = image_tree() | {f"{name}/cat/0.png": png(PIXELS[0])}
    _, parts = opened(tmp_path, as_folder(tmp_path / "images", tree))
    assert parts["validation"][0] == [1]


def test_a_class_that_train_does_not_have_is_refused(tmp_path):
    tree = image_tree() | {"test/dog/0.png": png(PIXELS[0])}
    assert "test has class 'dog', which train does not have" in refused(tmp_path, as_folder(tmp_path / "images", tree))


@pytest.mark.parametrize("tree", [{"a.png": b""}, {"notes/read.me": b""}])
def test_a_path_without_class_folders_is_refused_with_the_expected_form(tmp_path, tree):
    assert "expected class folders of images" in refused(tmp_path, as_folder(tmp_path / "images", tree))


def test_a_missing_path_and_another_kind_of_file_are_refused(tmp_path):
    assert "no such folder or archive" in refused(tmp_path, tmp_path / "absent")
    (tmp_path / "images.rar").touch()
    assert ".tar, .tar.gz, .tgz, .zip" in refused(tmp_path, tmp_path / "images.rar")


@pytest.mark.parametrize("packer", [packer for packer in PACKERS if packer != "images"])
@pytest.mark.parametrize(
    "name",
    ["../outside/0.png", "/etc/0.png", "train/../../0.png", "train\\..\\..\\0.png", "../readme.txt"],
)
def test_a_member_that_leaves_the_folder_is_refused_by_name(tmp_path, packer, name):
    path = PACKERS[packer](tmp_path / packer, image_tree() | {name: b"x"})
    message = refused(tmp_path, path)
    assert message.startswith(str(path))
    assert "leaves the archive's folder" in message or "has a backslash in its name" in message
    assert name in message or packer.endswith("zip")  # zip files have their own way to write backslashes


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_a_tar_archive_is_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        info = tarfile.TarInfo("train/bird/9.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    assert "member 'train/bird/9.png' is a link" in refused(tmp_path, tmp_path / "images.tar")


def test_a_link_in_a_zip_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        info = zipfile.ZipInfo("train/bird/9.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    assert "member 'train/bird/9.png' is a link" in refused(tmp_path, tmp_path / "images.zip")


@pytest.mark.parametrize("packer", [packer for packer in PACKERS if packer != "images"])
def test_an_archive_that_is_cut_short_is_refused(tmp_path, packer):
    path = PACKERS[packer](tmp_path / packer, image_tree())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(path) in refused(tmp_path, path)


def test_a_tar_archive_with_a_damaged_header_is_refused(tmp_path):
    path = as_tar(tmp_path / "images.tar", {f"a/{row}.png": png(PIXELS[row]) for row in range(6)})
    content = bytearray(path.read_bytes())
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    content[headers[-1] + 150] ^= 1  # its checksum
    path.write_bytes(content)
    assert "not a whole archive" in refused(tmp_path, path)
    path.write_bytes(content[: headers[-1] + 200])
    assert "not a whole archive" in refused(tmp_path, path)


def test_a_large_member_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.prepare.image_files.LARGEST_MEMBER", 10_000)
    for packer in ("images.tar", "images.zip"):
        path = PACKERS[packer](tmp_path / packer, image_tree() | {"train/bird/bomb.png": bytes(20_000)})
        assert "member 'train/bird/bomb.png' has 0 MB: too large" in refused(tmp_path, path)


def notes_of(tmp_path, path):
    with open_dataset(dataset_parameters(name="imagefolder", path=str(path)), tmp_path) as source:
        return source.class_names, list(source.notes)


def flat_tree(*names):
    return {name: png(PIXELS[row % len(PIXELS)]) for row, name in enumerate(names)}


LAYOUT = "expected class folders of images, CLASS/IMAGE, or train/CLASS/IMAGE and test/CLASS/IMAGE"


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize(
    "folders",
    [
        ("train", "test"),
        ("Training", "VAL"),
        ("train",),
        ("train", "training"),
        ("train", "test", "extra"),
        ("photos/train", "photos/test"),
        ("train/train", "train/test"),
        ("train/train/cat", "train/test/cat"),
        ("train/cat", "train/dog", "test"),  # the test part alone has no classes
        ("train/cat", "train/dog", "valid"),
    ],
)
def test_parts_without_class_folders_are_refused_with_the_expected_form(tmp_path, packer, folders):
    tree = flat_tree(*(f"{folder}/{row}.png" for folder in folders for row in range(2)))
    assert LAYOUT in refused(tmp_path, PACKERS[packer](tmp_path / packer, tree))


def test_one_class_may_be_called_as_a_part(tmp_path):
    path = as_folder(tmp_path / "images", flat_tree("bus/0.png", "car/0.png", "train/0.png"))
    assert notes_of(tmp_path, path) == (("bus", "car", "train"), [])


STRAYS = {
    "an image beside the wrapper": ("preview.png", "images in no class folder: the top folder (1)"),
    "an image in the wrapper": ("photos/preview.png", "images in no class folder: photos (1)"),
    "a text beside the wrapper": ("README.txt", "files that are no images by their names (1 of .txt)"),
    "a folder beside the wrapper": ("docs/README.txt", "folders without images: docs"),
    "a folder in the wrapper": ("photos/docs/README.txt", "folders without images: photos/docs"),
    "what other systems leave": ("__MACOSX/photos/cat/._0.png", None),
    "another one": (".DS_Store", None),
    "thumbnails": ("photos/Thumbs.db", None),
    "thumbnails of a store": ("photos/@eaDir/0.png", None),
}


@pytest.mark.parametrize("stray", STRAYS)
@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("parts", [("",), ("train/", "test/")])
def test_what_lies_beside_the_classes_is_told_by_name_and_changes_nothing(tmp_path, packer, stray, parts):
    names = [f"photos/{part}{label}/{row}.png" for part in parts for label in ("cat", "dog") for row in range(2)]
    name, told = STRAYS[stray]
    path = PACKERS[packer](tmp_path / packer, flat_tree(*names) | {name: png(PIXELS[0])})
    class_names, notes = notes_of(tmp_path, path)
    assert class_names == ("cat", "dog")
    assert [note for note in notes if told and told in note] == notes[:1]
    assert bool(notes) == bool(told)


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize(
    ("stray", "named"),
    [
        ("extra/0.png", ("extra", "photos")),  # is it 'photos' and 'extra', or 'cat' and 'dog'?
        ("photos/extra/deeper/0.png", ("photos/extra", "cat")),
    ],
)
def test_folders_of_which_it_is_unclear_whether_they_are_classes_are_refused_by_name(tmp_path, packer, stray, named):
    path = PACKERS[packer](tmp_path / packer, flat_tree("photos/cat/0.png", "photos/dog/0.png", stray))
    message = refused(tmp_path, path)
    assert "take away what is no class" in message
    assert all(name.rpartition("/")[2] in message for name in named)


def test_parts_beside_another_folder_of_images_are_refused_by_name(tmp_path):
    tree = image_tree()
    tree = {f"photos/{name}": content for name, content in tree.items()} | flat_tree("extra/more/0.png")
    message = refused(tmp_path, as_folder(tmp_path / "images", tree))
    assert "'test' is in 'photos', beside which there are other folders of images" in message


def test_a_folder_beside_the_parts_is_told(tmp_path):
    extra = flat_tree("extra/a/0.png", "extra/a/1.png", "unlabelled/0.png")
    _, notes = notes_of(tmp_path, as_folder(tmp_path / "images", image_tree() | extra))
    assert notes == ["left out: images in no class folder: extra/a (2), unlabelled (1)"]


def test_many_folders_are_told_in_one_line(tmp_path):
    extra = flat_tree(*(f"extra/{number:03}/0.png" for number in range(20)))
    _, (note,) = notes_of(tmp_path, as_folder(tmp_path / "images", image_tree() | extra))
    assert note.endswith("extra/004 (1) and 15 more")


def test_a_single_class_is_refused_by_name(tmp_path):
    message = refused(tmp_path, as_folder(tmp_path / "images", flat_tree("photos/0.png", "photos/1.png")))
    assert f"all images are of one class, 'photos'; {LAYOUT}" in message


@pytest.mark.parametrize("packer", PACKERS)
def test_classes_that_take_the_images_of_deeper_folders_are_told(tmp_path, packer):
    path = PACKERS[packer](tmp_path / packer, flat_tree("a/x/0.png", "b/x/0.png", "b/y/0.png"))
    assert notes_of(tmp_path, path) == (("a", "b"), ["classes that take the images of all folders below theirs: a, b"])


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("train/empty", "left out: folders without images: train/empty"),
        ("train/notes/0.heic", "left out: folders without images: train/notes"),
        ("test/notes/0.heic", "left out: folders without images: test/notes"),
        ("validation", "left out: folders without images: validation"),
        ("train/bird/empty", None),  # a class has images elsewhere
    ],
)
def test_class_folders_without_images_are_told_by_name(tmp_path, packer, entry, told):
    tree = image_tree() | ({entry: b"x"} if entry.endswith(".heic") else {})
    path = PACKERS[packer](tmp_path / packer, tree)
    if not entry.endswith(".heic"):
        add_folder(path, entry)
    class_names, notes = notes_of(tmp_path, path)
    assert class_names == ("bird", "cat")
    assert notes[:1] == ([told] if told else [])


def add_folder(path, name):
    """Put an empty folder into a folder or archive."""
    if path.is_dir():
        (path / name).mkdir()
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "a") as archive:
            archive.mkdir(name)
    else:
        content = path.read_bytes()
        is_packed = content[:2] == b"\x1f\x8b"
        path.write_bytes(gzip.decompress(content) if is_packed else content)
        info = tarfile.TarInfo(name)
        info.type = tarfile.DIRTYPE
        with tarfile.open(path, "a") as archive:
            archive.addfile(info)
        if is_packed:
            path.write_bytes(gzip.compress(path.read_bytes()))


def test_links_that_lead_nowhere_and_to_what_was_read_are_told(tmp_path):
    path = as_folder(tmp_path / "images", image_tree())
    (path / "train/cow").symlink_to("cat")
    (path / "train/bird/9.png").symlink_to("absent.png")
    class_names, notes = notes_of(tmp_path, path)
    assert class_names == ("bird", "cat")
    assert notes == [
        "passed over: links to folders that are read under another name: train/cow",
        "passed over: links that lead nowhere, and special files: train/bird/9.png",
    ]


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("name", ["a.avif", "a.jp2", "a.tga", "a.PBM", "a.qoi", "a.psd", "a.jpe"])
def test_whatever_pil_reads_is_an_image(tmp_path, packer, name):
    path = PACKERS[packer](tmp_path / packer, image_tree() | {f"train/cat/{name}": png(PIXELS[0])})
    assert len(opened(tmp_path, path)[1]["train"][0]) == 7


@pytest.mark.parametrize("name", ["a.pdf", "a.eps", "a.ps", "a.h5", "a.mpg", "a.wmf", "a.fits", "a.grib", "png"])
def test_what_is_no_picture_is_told_and_not_opened(tmp_path, name):
    path = as_folder(tmp_path / "images", image_tree() | {f"train/cat/{name}": png(PIXELS[0])})
    _, (note,) = notes_of(tmp_path, path)
    assert "files that are no images by their names (1 of " in note
    assert len(opened(tmp_path, path)[1]["train"][0]) == 6


SPARSE = {
    "old GNU": ["--format=oldgnu"],
    "GNU": ["--format=gnu"],
    **{f"PAX {version}": ["--format=posix", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0")},
}


def bmp(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "BMP")
    return content.getvalue()


def write_with_holes(path, content, block=4096):
    with open(path, "wb") as file:
        file.truncate(len(content))
        for start in range(0, len(content), block):
            if any(content[start : start + block]):
                file.seek(start)
                file.write(content[start : start + block])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_tar_archives_are_read_as_they_were_packed(tmp_path, kind, packed):
    generator = np.random.default_rng(0)
    images = {}
    for number in range(4):
        pixels = np.zeros((300, 400, 3), np.uint8)
        for _ in range(12 * number):  # more pieces than fit into one header
            row = generator.integers(0, 300)
            pixels[row, :50] = generator.integers(0, 256, (50, 3))
        images[f"{'ab'[number % 2]}/{number}.bmp"] = pixels
    for name, pixels in images.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        write_with_holes(tmp_path / "images" / name, bmp(pixels))
    archive = tmp_path / ("images.tar.gz" if packed else "images.tar")
    command = ["tar", "--create", "--sparse", "--hole-detection=raw", *SPARSE[kind]]
    command += ["--gzip"] if packed else []
    subprocess.run([*command, "--file", archive, "--directory", tmp_path / "images", "a", "b"], check=True)
    plain = gzip.decompress(archive.read_bytes()) if packed else archive.read_bytes()
    assert len(plain) < sum(pixels.nbytes for pixels in images.values()) / 2
    with tarfile.open(archive) as members:
        assert sum(member.issparse() for member in members) == 4
    _, parts = opened(tmp_path, archive)
    labels, read = parts["train"]
    assert labels == [0, 0, 1, 1]
    for name, pixels in zip(sorted(images), read, strict=True):
        assert np.array_equal(pixels, images[name]), name


NAMES = {  # the bytes of a part of a name, and what is said of it
    "latin-1": (b"caf\xe9", "is not UTF-8"),
    "shift-jis": (b"\x94\x4c", "is not UTF-8"),
    "newline": (b"ca\nt", "has control characters"),
    "escape": (b"\x1b[31mcat", "has control characters"),
    "delete": (b"cat\x7f", "has control characters"),
    "next line": ("ca\x85t".encode(), "has control characters"),
    "line separator": ("ca\u2028t".encode(), "has control characters"),
}


def with_name(packer, path, part, name):
    """A folder or archive in which a placeholder in a name was replaced by bytes."""
    placeholder = "X" * len(name)
    tree = image_tree() | {part.replace("NAME", placeholder): png(PIXELS[0])}
    if packer == "images":
        return as_folder(path, {key.replace(placeholder, os.fsdecode(name)): value for key, value in tree.items()})
    if packer.endswith("zip"):  # no flag says that names are UTF-8
        as_zip(path, tree)
        path.write_bytes(path.read_bytes().replace(placeholder.encode(), name))
        return path
    tree = {key.replace(placeholder, name.decode("utf-8", "surrogateescape")): value for key, value in tree.items()}
    return PACKERS[packer](path, tree)


@pytest.mark.parametrize("part", ["train/NAME/0.png", "train/cat/NAME.png"])
@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("kind", NAMES)
def test_names_that_nobody_could_read_are_refused(tmp_path, kind, packer, part):
    name, reason = NAMES[kind]
    message = refused(tmp_path, with_name(packer, tmp_path / packer, part, name))
    assert reason in message
    assert message.isprintable()
    assert part.partition("NAME")[0] in message


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("name", ["café", "猫　犬", "кот", "🐈‍⬛", "a b", "cat\u00a0"])
def test_names_in_any_language_are_kept(tmp_path, packer, name):
    class_names, _ = opened(tmp_path, with_name(packer, tmp_path / packer, "train/NAME/0.png", name.encode()))
    assert set(class_names) == {"bird", "cat", name}


@pytest.mark.parametrize("parts", [("train", "train"), ("train", "test")])
@pytest.mark.parametrize("packer", PACKERS)
def test_names_in_two_unicode_forms_are_refused(tmp_path, packer, parts):
    twins = ("caf\u00e9", "cafe\u0301")
    tree = image_tree() | flat_tree(*(f"{part}/{name}/0.png" for part, name in zip(parts, twins, strict=True)))
    message = refused(tmp_path, PACKERS[packer](tmp_path / packer, tree))
    assert "are one text in two Unicode forms: rename one" in message
    assert message.isascii()


@pytest.mark.parametrize("twins", [("Kitten", "kitten"), ("K", "\uff2b"), ("cow", "cow ")])
@pytest.mark.parametrize("packer", PACKERS)
def test_names_that_are_nearly_the_same_are_told(tmp_path, packer, twins):
    tree = image_tree() | flat_tree(*(f"train/{name}/0.png" for name in twins))
    class_names, notes = notes_of(tmp_path, PACKERS[packer](tmp_path / packer, tree))
    assert set(twins) < set(class_names)
    first, second = map(ascii, sorted(twins))
    assert notes == [f"classes of their own, though their names are alike: {first} and {second}"]


def idx(array):
    """The format of MNIST's files."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def mnist_files():
    gray = PIXELS[..., 0]
    return {
        f"{part}-{kind}-ubyte.gz": idx(array)
        for part, rows in (("train", gray[:ROWS]), ("t10k", gray[ROWS:]))
        for kind, array in (("images-idx3", rows), ("labels-idx1", LABELS))
    }


def cifar_files(key):
    def batch(rows):
        return pickle.dumps({"data": rows.transpose(0, 3, 1, 2).reshape(ROWS, -1), key: list(map(int, LABELS))})

    return {
        "train": batch(PIXELS[:ROWS]),
        "test": batch(PIXELS[ROWS:]),
        "meta": pickle.dumps({"names": ["a", "b", "c"]}),
    }


def svhn_file(rows):
    content = io.BytesIO()
    scipy.io.savemat(content, {"X": rows.transpose(1, 2, 3, 0), "y": np.where(LABELS == 0, 10, LABELS)[:, None]})
    return content.getvalue()


@pytest.fixture
def server(tmp_path):
    """A folder that a local server serves, and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{http.server_port}/"
        http.shutdown()
        thread.join()


def serve(monkeypatch, server, name):
    """Put files in the form of a torchvision dataset on the server, and point torchvision at them."""
    from torchvision import datasets

    folder, address = server
    digest = lambda content: md5(content).hexdigest()  # noqa: E731
    if name in ("mnist", "fashion_mnist"):
        loader, files = datasets.MNIST if name == "mnist" else datasets.FashionMNIST, mnist_files()
        monkeypatch.setattr(loader, "mirrors", [address])
        monkeypatch.setattr(loader, "resources", [(name, digest(files[name])) for name in files])
    elif name == "svhn":
        loader, files = datasets.SVHN, {"train.mat": svhn_file(PIXELS[:ROWS]), "test.mat": svhn_file(PIXELS[ROWS:])}
        entries = {
            part: [address + f"{part}.mat", f"{part}.mat", digest(files[f"{part}.mat"])] for part in ("train", "test")
        }
        monkeypatch.setattr(loader, "split_list", entries)
    else:
        loader = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        contents = cifar_files("labels" if name == "cifar10" else "fine_labels")
        as_tar(folder / "packed", {f"batches/{key}": value for key, value in contents.items()}, "w:gz")
        files = {"batches.tar.gz": (folder / "packed").read_bytes()}
        monkeypatch.setattr(loader, "base_folder", "batches")
        monkeypatch.setattr(loader, "url", address + "batches.tar.gz")
        monkeypatch.setattr(loader, "filename", "batches.tar.gz")
        monkeypatch.setattr(loader, "tgz_md5", digest(files["batches.tar.gz"]))
        for part in ("train", "test"):
            monkeypatch.setattr(loader, f"{part}_list", [[part, digest(contents[part])]])
        monkeypatch.setattr(loader, "meta", {"filename": "meta", "key": "names", "md5": digest(contents["meta"])})
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return files


TORCHVISION = ["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"]


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_datasets_are_downloaded_once(tmp_path, monkeypatch, server, name):
    serve(monkeypatch, server, name)
    class_names, parts = opened(tmp_path, tmp_path / "raw", name)
    assert len(class_names) == (3 if name.startswith("cifar") else 10)
    for number, part in enumerate(("train", "test")):
        labels, images = parts[part]
        assert labels == list(LABELS)
        expected = PIXELS[ROWS * number :][:ROWS]
        assert np.array_equal(images, expected[..., 0] if name.endswith("mnist") else expected)
    for path in server[0].iterdir():
        path.unlink()
    again = opened(tmp_path, tmp_path / "raw", name)
    assert again[0] == class_names
    assert again[1]["train"][0] == parts["train"][0]


@pytest.mark.parametrize("name", TORCHVISION)
def test_without_a_network_the_error_says_which_files_belong_where(tmp_path, monkeypatch, server, name):
    files = serve(monkeypatch, server, name)
    served = {file: (server[0] / file).read_bytes() for file in files}
    for file in files:
        (server[0] / file).unlink()
    message = refused(tmp_path, tmp_path / "raw", name)
    assert "nor downloaded" in message
    for file, content in served.items():
        words = (word.rstrip(",") for word in message.split())
        (target,) = (word for word in words if word.endswith(f"/{file}") and not word.startswith("http"))
        assert f"{server[1]}{file} as {target}" in message
        with open(target, "wb") as stream:  # the folder is there already
            stream.write(content)
    assert opened(tmp_path, tmp_path / "raw", name)[1]["test"][0] == list(LABELS)


def test_a_damaged_download_is_refused(tmp_path, monkeypatch, server):
    serve(monkeypatch, server, "cifar10")
    (server[0] / "batches.tar.gz").write_bytes(b"<html>no such page</html>")
    assert "corrupted" in refused(tmp_path, tmp_path / "raw", "cifar10")


def test_digits_are_as_scikit_learn_has_them(tmp_path):
    from sklearn.datasets import load_digits

    class_names, parts = opened(tmp_path, tmp_path, "digits")
    labels, images = parts["train"]
    original = load_digits()
    assert parts.keys() == {"train"}
    assert class_names == tuple("0123456789")
    assert np.array_equal(labels, original.target)
    np.testing.assert_allclose(np.array(images) / 255, original.images / 16, atol=0.5 / 255 + 1e-12)


def test_spirals_are_three_arms_in_a_plane_of_two_pixels(tmp_path):
    class_names, parts = opened(tmp_path, tmp_path, "spirals")
    assert (class_names, parts.keys()) == (("0", "1", "2"), {"train"})
    labels, images = np.array(parts["train"][0]), np.array(parts["train"][1])
    assert np.bincount(labels).tolist() == [1000, 1000, 1000]
    assert (images.shape, images.dtype) == ((3000, 1, 2), np.uint8)
    across, up = (images[:, 0].T / 255 - 0.5) / 0.4
    radius, angle = np.hypot(across, up), np.arctan2(up, across)
    outside = radius > 0.3  # where noise changes the angle little
    turned = np.exp(1j * (angle - 1.5 * np.pi * radius - 2 * np.pi * labels / 3))[outside]
    assert abs(np.angle(turned.mean())) < 0.05  # noise makes radii a little longer
    assert np.abs(np.angle(turned)).max() < np.pi / 3 * 1.5
    assert np.mean(np.abs(np.angle(turned)) < np.pi / 3) > 0.99
    again = opened(tmp_path, tmp_path, "spirals")[1]["train"]
    np.testing.assert_array_equal(images, np.array(again[1]))
