"""Is this machine, this folder, this environment fit for a run? Each look gives lines; a problem says what to do."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from pipeline.core.errors import PipelineError, shown
from pipeline.core.files import local_path
from pipeline.core.parameters import Params, load_params, read_yaml
from pipeline.core.store import Store
from pipeline.core.text import leaves
from pipeline.core.timings import read_records
from pipeline.images.prepared import read_prepared
from pipeline.machine.processor import Limit, cores, processor, threads
from pipeline.networks.pretrained import LIBRARY
from pipeline.shards.format import MANIFEST, SHARD_FILES, columns_of

NEEDED = ("torch", "torchvision", "h5py", "numpy", "pydantic", "safetensors", "lightning-fabric", "altair")
OPTIONAL = {
    "dvc": "for `dvc repro`; every stage also runs alone, as python -m stages.attack: pip install '.[dvc]'",
    "distributed": "for --scheduler: pip install '.[dask]'",
    "timm": "for networks timm.<name>: pip install '.[timm]'",
    "fsspec": "for datasets behind a URL: pip install '.[remote]'",
    "pyarrow": "for `shards export`: pip install '.[parquet]'",
    "onnxruntime": "for `export` to ONNX: pip install '.[export]'",
}
DVC_SECONDS = 60
NO_GIT = "is not a git repository"  # in what DVC says
NO_SCM = "dvc config --local core.no_scm true"
LINKS = "hardlink,reflink,copy"  # cache.type, by which DVC's cache shares the files of results
INIT = "git init && dvc init (without git: dvc init --no-scm)"


class Line(NamedTuple):
    """What a look found."""

    state: Literal["ok", "note", "problem"]
    topic: str
    text: str


def examine(folder: Path, params_path: Path) -> Iterator[Line]:
    """Yield all lines, of what is quick to find out first.

    Args:
        folder: of the project.
        params_path: the parameter file.
    """
    yield from _packages()
    yield from _machine()
    params = None
    try:
        params = load_params(params_path)
        yield Line("ok", "parameters", f"{params_path}: {params.dataset.name}, teacher {params.teacher.network}")
    except (PipelineError, ImportError) as error:
        yield Line("problem", "parameters", f"{error}")
    if params is not None:
        yield from _device(params)
        yield from _dataset(params)
        yield from disk(folder, params)
    yield from _locks(folder)
    yield from _timings(folder)
    yield from dvc_lines(folder, params_path)


def _packages() -> Iterator[Line]:
    yield Line("ok", "Python", platform.python_version())
    for name in NEEDED:
        try:
            yield Line("ok", name, version(name))
        except PackageNotFoundError:
            yield Line("problem", name, "is not installed: pip install -c constraints.txt -e .")
    for name, use in OPTIONAL.items():
        try:
            yield Line("ok", name, version(name))
        except PackageNotFoundError:
            yield Line("note", name, f"is not installed; it is {use}")


def _machine() -> Iterator[Line]:
    usable, there = cores(), os.cpu_count()
    of_all = "" if usable.most == there else f" of {there}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    text = f"{processor()}, {usable.most}{of_all} cores for this process ({usable.reason}), {memory:.0f} GB of memory"
    yield Line("ok", "machine", text)


def _device(params: Params) -> Iterator[Line]:
    limit = Limit(params.runtime.threads, "runtime.threads") if params.runtime.threads else threads()
    yield Line("ok", "threads", f"{limit.most} of the CPU ({limit.reason})")
    if find_spec("torch") is None:
        return
    import torch  # imported here: slow

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            yield Line("ok", f"GPU {number}", f"{about.name}, {about.total_memory / 1e9:.0f} GB")
        if params.runtime.device == "cpu":
            yield Line("note", "device", "runtime.device is 'cpu': the GPU is not used")
    elif params.runtime.device == "cuda":
        reason = "this torch has no CUDA" if torch.version.cuda is None else "torch finds no GPU or driver"
        yield Line("problem", "device", f"runtime.device is 'cuda', but {reason}: set it to 'auto'")
    else:
        yield Line("note", "device", "no GPU: all runs on the CPU")
    if params.runtime.devices > 1 and params.runtime.device != "cpu" and torch.cuda.is_available():
        there = torch.cuda.device_count()
        if there < params.runtime.devices:
            yield Line("problem", "device", f"runtime.devices is {params.runtime.devices}, there are {there} GPUs")


def _dataset(params: Params) -> Iterator[Line]:
    name, path = params.dataset.name, Path(params.dataset.path)
    if not path.exists():
        advice = "set dataset.path" if name == "imagefolder" else f"mkdir -p {path}"
        yield Line("problem", "dataset", f"dataset.path: {path} does not exist: {advice}")
    elif name in ("digits", "spirals"):
        yield Line("ok", "dataset", f"{name}, nothing to download")
    elif name == "imagefolder":
        yield Line("ok", "dataset", f"images of {path}")
    else:
        yield Line("ok", "dataset", f"{name}, from {path}, or downloaded to it")
    files = {"teacher.weights": params.teacher.weights, "teacher.pretrained": params.teacher.pretrained}
    files |= {f"pretrained.{student}": given for student, given in params.pretrained.items()}
    for key, given in files.items():
        if given not in (None, LIBRARY) and not Path(given).is_file():
            yield Line("problem", key.partition(".")[0], f"{key}: {given} does not exist")


def disk(folder: Path, params: Params, free: int | None = None) -> Iterator[Line]:
    """Say whether the sample dataset fits on the disk of a folder; the teacher's features are not counted.

    Args:
        folder: of the project.
        params: what is asked for.
        free: bytes; by default, what the system says.
    """
    free = shutil.disk_usage(folder).free if free is None else free
    try:
        train = read_prepared(folder / "data/prepared/train.h5")
    except PipelineError:
        yield Line("ok", "disk", f"{free / 1e9:,.1f} GB free; what is needed is known after: python -m stages.prepare")
        return
    attack, sizes = params.attack, (train.view_shape, len(train.class_names))
    columns = columns_of(
        *sizes, attack.targets, attack.embed_images, params.views, train.images.shape[2:], attack.logits
    )
    row = sum(prod(column.shape) * np.dtype(column.dtype).itemsize for column in columns.values())
    need = row * len(train.labels) * attack.views
    text = f"{free / 1e9:,.1f} GB free, {need / 1e9:,.2f} GB for the samples"
    if need > free:
        text += ": free some, lower attack.views, or set attack.embed_images: false"
    yield Line("problem" if need > free else "ok", "disk", text)


def _locks(folder: Path) -> Iterator[Line]:
    """Say which runs are under way: owners of locks that are alive."""
    for path in sorted((folder / ".work").glob("*.pid")):
        owner = path.read_text(encoding="utf-8").strip()
        if owner.isdigit() and _holds(int(owner), path.with_suffix(".lock")):
            yield Line("note", "lock", f"process {owner} is at work ({path.stem}): another run of it would wait")


def _holds(process: int, lock: Path) -> bool:
    """Return whether a process has a file open."""
    try:
        entries = list(Path(f"/proc/{process}/fd").iterdir())
    except OSError:
        return False
    return any(os.path.realpath(entry) == str(lock.resolve()) for entry in entries)


def _timings(folder: Path) -> Iterator[Line]:
    """Say how long stages took when they last had work to do here."""
    for name, record in read_records(folder / ".work/runs").items():
        yield Line("ok", name, f"took {record.seconds:,.1f} s when it last had work: {record.said}")


def dvc_lines(folder: Path, params_path: Path) -> Iterator[Line]:
    """Say what hinders `dvc repro`, which itself may tell it after hours of work; else what it would run.

    Args:
        folder: of the project.
        params_path: the parameter file.
    """
    program = Path(sys.executable).with_name("dvc")
    command = str(program) if program.is_file() else shutil.which("dvc")
    if command is None:
        return
    if not (folder / "dvc.yaml").is_file():
        yield Line("problem", "DVC", f"{folder.resolve()} has no dvc.yaml: change to the project's folder")
        return
    problems = [*_repository(folder), *_paths(folder, params_path), *_links(folder, command)]
    yield from problems or (*_cache(folder, command), *_edited(folder), *_status(folder, command))


def _repository(folder: Path) -> Iterator[Line]:
    """Say what is wrong with the folder itself."""
    if not any((above / ".dvc").is_dir() for above in (folder, *folder.resolve().parents)):
        yield Line("problem", "DVC", f"there is no .dvc here: {INIT}, or run stages alone, without DVC")
    for path in (folder, folder / ".dvc"):
        if path.is_dir() and not os.access(path, os.W_OK):
            yield Line("problem", "DVC", f"{path.resolve()} cannot be written: copy the project to a folder of yours")
            return


def _paths(folder: Path, params_path: Path) -> Iterator[Line]:
    """Say which paths of the parameters DVC cannot follow."""
    try:
        values = dict(leaves(read_yaml(params_path)))
    except (PipelineError, AttributeError):  # which `parameters` tells
        return
    for name in ("code", "dataset.path"):
        path = values.get(name)
        if isinstance(path, str) and path.startswith(("~", "file:")):
            full = shlex.quote(f"{name}={local_path(path)}")
            yield Line("problem", name, f"DVC takes {path} literally: python -m stages.configure {full}")
        elif name == "code" and isinstance(path, str) and not (folder / path).is_dir():
            yield Line("problem", "code", f"{path} does not exist, and DVC looks at it: mkdir -p {shlex.quote(path)}")


def _links(folder: Path, command: str) -> Iterator[Line]:
    """Say which folders of results lead out of the git repository: DVC refuses the results when they are made."""
    repository = next((above for above in (folder / "x").resolve().parents if (above / ".git").exists()), None)
    if repository is None:
        return
    try:
        stages = read_yaml(folder / "dvc.yaml").get("stages", {}).values()
        results = [out for stage in stages for kind in ("outs", "metrics") for out in stage.get(kind, [])]
        above = {
            parent for out in results for parent in Path(next(iter(out)) if isinstance(out, dict) else out).parents
        }
    except (PipelineError, AttributeError, TypeError):  # which `dvc status` tells
        return
    links = [path for path in sorted(above) if (folder / path).is_symlink()]
    away = [path for path in links if not (folder / path).resolve().is_relative_to(repository)]
    if away and _dvc_says(folder, command, "config", "core.no_scm").stdout.strip() != b"true":
        for path in away:
            yield Line(
                "problem",
                "DVC",
                f"{path} leads to {(folder / path).resolve()}, out of the git repository, where DVC keeps no results: "
                f"make {path} a folder, in which what you bring may be a link; for room elsewhere: "
                "dvc cache dir --local FOLDER && dvc config --local cache.type symlink",
            )


def _cache(folder: Path, command: str) -> Iterator[Line]:
    """Say where DVC's cache keeps a copy of its own of what the pipeline makes."""
    kind = _dvc_says(folder, command, "config", "cache.type").stdout.decode().strip()
    if kind.partition(",")[0] not in ("hardlink", "symlink"):
        yield Line(
            "note",
            "DVC",
            f"cache.type is {shown(kind) or 'not set'}: where the disk has no reflinks, DVC's cache takes as much room "
            f"again as all results: dvc config cache.type {LINKS}",
        )


def _edited(folder: Path) -> Iterator[Line]:
    """Say which published shards were changed in their place: DVC may restore them from its cache, changed."""
    published, store = folder / "data/bss", Store(folder / ".work/shards")
    try:
        fingerprint = json.loads((published / MANIFEST).read_bytes())["fingerprint"]
    except (OSError, ValueError, TypeError, KeyError):
        return
    for path in sorted(published.glob(SHARD_FILES)):
        name = f"{fingerprint}/{path.name}"
        if store.unchanged(name) is None and store.path(name).exists() and path.samefile(store.path(name)):
            yield Line("note", "shards", f"{path} was changed since it was made: python -m stages.attack")
            return


def _status(folder: Path, command: str) -> Iterator[Line]:
    """Say what `dvc status` says of the stages."""
    try:
        status = _dvc_says(folder, command, "status", "--json", "dvc.yaml")
        stages = list(json.loads(status.stdout))
    except subprocess.TimeoutExpired:
        yield Line("note", "DVC", f"`dvc status` takes more than {DVC_SECONDS} s")
    except ValueError:
        said = status.stderr.decode(errors="replace")
        if NO_GIT in said:
            yield Line("problem", "DVC", f"this is no git repository: git init, or to do without: {NO_SCM}")
        else:
            reason = shown((said.strip().splitlines() or ["no answer"])[0])
            yield Line("problem", "DVC", f"`dvc status` fails: {reason}")
    else:
        changed = ", ".join(name.removeprefix("dvc.yaml:") for name in stages)
        yield Line("ok", "DVC", f"to run: {changed}: dvc repro") if stages else Line("ok", "DVC", "all is up to date")


def _dvc_says(folder: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([command, *arguments], cwd=folder, capture_output=True, timeout=DVC_SECONDS)
