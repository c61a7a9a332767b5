"""What a file is that was given as weights and holds none that can be read."""

from __future__ import annotations

import zipfile
from pathlib import Path

from pipeline.core.text import LFS_POINTER, LFS_SIGNATURE

HEAD = 512  # bytes that are looked at: the signature of a tar archive lies at 257
AGAIN = "copy or download it again"
UNPACK = "unpack it, and name the checkpoint in it"
SIGNATURES = {
    LFS_SIGNATURE: LFS_POINTER,
    b"\x89HDF": "an HDF5 file, as Keras writes them: convert it to a state dict of torch where it was made",
    b"\x93NUMPY": "a NumPy array (.npy): save a state dict with torch.save",
    b"GGUF": "a GGUF file of a language model, no image classifier",
    b"\x1f\x8b": f"packed with gzip: {UNPACK}",
    b"BZh": f"packed with bzip2: {UNPACK}",
    b"\xfd7zXZ": f"packed with xz: {UNPACK}",
    b"\x28\xb5\x2f\xfd": f"packed with zstd: {UNPACK}",
    b"7z\xbc\xaf": f"a 7z archive: {UNPACK}",
}
PICKLE, ZIP = b"\x80", b"PK\x03\x04"


def foreign_kind(path: Path) -> str | None:
    """Return what a file is and what to do, in words; None where it may hold tensors, as pickles and safetensors do."""
    if path.is_dir():
        return "a folder: name the weights file in it"
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not head:
        return f"an empty file: {AGAIN}"
    for signature, kind in SIGNATURES.items():
        if head.startswith(signature):
            return kind
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return f"a web page, not the file itself: {AGAIN}"
    if head[257:262] == b"ustar":
        return f"a tar archive: {UNPACK}"
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and b"\x12\x07pytorch" in head):
        return "an ONNX graph, not a state dict: save model.state_dict() of the network that it was exported from"
    return _kind_of_zip(path) if head.startswith(ZIP) else None


def is_pickle(path: Path) -> bool:
    """Return whether a file begins as pickles do, plain ones or those that torch packs."""
    with open(path, "rb") as file:
        return file.read(len(ZIP)).startswith((PICKLE, ZIP))


def _kind_of_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError):
        return f"an archive that is cut off or damaged: {AGAIN}"
    if any(name.endswith(".npy") for name in names):
        return "arrays of NumPy (.npz): save a state dict with torch.save"
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "a TorchScript archive, which is code: where you trust it, in Python, "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )
    if any(name.endswith(("/archive_format", "serialized_exported_program.json")) for name in names):
        return (
            "a program of torch.export (.pt2): where you trust it, in Python, "
            "torch.save(dict(torch.export.load(FILE).state_dict), NEW)"
        )
    if not any(name.endswith("data.pkl") for name in names):
        return f"a zip archive, not one of torch: {UNPACK}"
    return None
