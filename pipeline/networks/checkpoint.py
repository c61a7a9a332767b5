"""Checkpoints as other programs write them: the weights of a named network are found in them, and written alone.

All tensors of a checkpoint have a dotted name here: the keys that lead to it, wherever they end and the names of a
state dict begin. The weights of a network are where all its names follow one beginning, which is called their entry.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from pipeline.core.errors import WeightsError, shown
from pipeline.core.files import write_atomically
from pipeline.core.text import one_line
from pipeline.networks.file_kinds import AGAIN, foreign_kind, is_pickle
from pipeline.networks.template import COUNTER, Template
from pipeline.networks.weights import METADATA, read_architecture

WRAPPERS = ("_orig_mod", "module")  # parts of names that torch.compile, DataParallel and AveragedModel put in
WHOLE = "."  # the entry of weights that lie in the checkpoint itself
INDEX = ".index.json"  # ends the name of a list of files
NAMED = 4  # things, in messages
DIGITS = re.compile(r"\d+")


class _Number:
    """Stands for a number of NumPy, as an accuracy or a learning rate: nothing of NumPy runs on what a file says."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# torch takes a stand-in for what has its name in the pickle.
NUMBERS: list[Any] = [
    type(name, (_Number,), {"__module__": module})
    for module, name in (("numpy", "dtype"), ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"))
]


class Converted(NamedTuple):
    """What was found in a checkpoint and written."""

    entry: str
    tensors: int
    classes: int
    channels: int | None
    """None where the network takes any."""
    cast: list[str]
    """Types of the file that became float32, as `float16`."""
    left_out: list[str]
    """What else is in the checkpoint, in words."""


def convert_checkpoint(
    source: Path,
    target: Path,
    network: str,
    entry: str | None = None,
    order: tuple[Sequence[str], Sequence[str]] | None = None,
) -> Converted:
    """Find the weights of a network in a checkpoint and write them to a safetensors file, atomically.

    Checkpoints are pickles of torch, of which tensors and plain values alone are loaded, safetensors files, and lists
    of those (`.safetensors.index.json`). Floating-point weights become float32. A description of the network that
    this project wrote is kept.

    Args:
        source: the checkpoint.
        target: the file to write.
        network: its name.
        entry: where the weights are, if there are several that fit.
        order: names of the classes in the order of the weights, and of the classes to write, each one of those.

    Raises:
        WeightsError: the file is missing, is something else or holds objects; no weights in it fit the network, or
            several do; the names of the classes are not those of the weights; or there is a target already.
    """
    if target.exists():
        raise WeightsError(f"{target}: is there already: name another file with --out")
    template = Template(network)
    checkpoint = _Checkpoint(read_checkpoint(source))
    found = _chosen(source, checkpoint, template, entry)
    state = checkpoint.state_at(found, template)
    sizes = template.sizes_of(state)
    if sizes.classes is None or sizes.classes < 2:
        raise WeightsError(f"{source}: weights of {network} for {sizes.classes} class: at least 2 are needed")
    cast = sorted({str(t.dtype).removeprefix("torch.") for t in state.values() if t.is_floating_point()} - {"float32"})
    state = {name: _plain(source, name, tensor) for name, tensor in state.items()}
    classes = sizes.classes
    if order is not None:
        rows = _rows(source, sizes.classes, *order)
        classes = len(rows)
        for name, axis in template.class_axes:
            state[name] = state[name].index_select(axis, rows)
    write_atomically(target, save(state, _description(source, network, classes)))
    return Converted(found, len(state), classes, sizes.channels, cast, checkpoint.beside(found, template))


def read_checkpoint(path: Path) -> Any:
    """Return what a checkpoint holds: nested containers of tensors and plain values, on the CPU.

    Raises:
        WeightsError: it is missing, is something else, is damaged or holds objects.
    """
    if not path.exists():
        raise WeightsError(f"{path}: no such weights file")
    if path.name.endswith(INDEX):
        return _listed(path)
    if kind := foreign_kind(path):
        raise WeightsError(f"{path}: {kind}")
    if not is_pickle(path):
        try:
            return load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            reason = one_line(error)
            raise WeightsError(
                f"{path}: neither a checkpoint of torch nor of safetensors ({reason}): {AGAIN}"
            ) from None
    with torch.serialization.safe_globals(NUMBERS):
        try:
            with warnings.catch_warnings(action="ignore"):  # of torch about its own storages
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises all kinds on what is no checkpoint
            raise WeightsError(f"{path}: {_why_not_loaded(path, error)}") from None


def _listed(path: Path) -> dict[str, Any]:
    """Return what the files hold that an index lists, which lie beside it."""
    try:
        files = sorted({str(name) for name in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise WeightsError(f"{path}: no list of checkpoints (`weight_map`)") from None
    state: dict[str, Any] = {}
    for name in files:
        if Path(name).name != name or name.endswith(INDEX):
            raise WeightsError(f"{path}: names what is no checkpoint beside it: {shown(name)}")
        state |= _leaves(read_checkpoint(path.parent / name))
    return state


def _why_not_loaded(path: Path, error: Exception) -> str:
    """Return why torch did not load a pickle, and what to do."""
    save_it = "where you trust it, load it in Python and torch.save(model.state_dict(), NEW)"
    if objects := _objects_in(path, error):
        more = f" and {len(objects) - NAMED} more" if len(objects) > NAMED else ""
        return (
            f"holds objects, which could run code and are not loaded: {', '.join(map(shown, objects[:NAMED]))}{more}; "
            f"{save_it}, with nothing beside it but plain numbers"
        )
    reason = one_line(error)
    for mark in ("WeightsUnpickler error:", "Check the documentation"):  # what torch advises is not for users of this
        before, found, after = reason.partition(mark)
        reason = (after if "error" in mark else before) if found else reason
    return f"cannot be loaded as tensors alone ({reason.strip()}): {AGAIN}; or {save_it}"


def _objects_in(path: Path, error: Exception) -> list[str]:
    """Return the names of the classes and functions in a pickle that are not loaded, those of NumPy in two words."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an older format, or damaged
        names = []
    names = names or re.findall(r"Unsupported global: GLOBAL (\S+)", str(error))
    plain = ["arrays of NumPy" if name.startswith("numpy.") else name for name in names]
    return sorted(set(plain), key=lambda name: (" " in name, name))


class _Checkpoint:
    """What a checkpoint holds, by dotted names."""

    def __init__(self, content: Any) -> None:
        leaves = dict(_leaves(content))
        plain = Counter(map(_without_wrappers, leaves))
        self.leaves = {
            short if plain[short := _without_wrappers(name)] == 1 else name: value for name, value in leaves.items()
        }
        self.tensors = {name: value for name, value in self.leaves.items() if isinstance(value, Tensor)}

    def entries(self, template: Template) -> dict[str, int]:
        """Return how many of a network's tensors follow each beginning that any of them follows, most first."""
        wanted = set(map(_without_wrappers, template.tensors))
        count: Counter[str] = Counter()
        for name in self.tensors:
            parts = name.split(".")
            count.update(".".join(parts[:n]) for n in range(len(parts)) if ".".join(parts[n:]) in wanted)
        return dict(count.most_common())

    def state_at(self, entry: str, template: Template) -> dict[str, Tensor]:
        """Return the network's tensors at an entry, as far as they are there, with their counters, by its own names."""
        names = {_without_wrappers(name): name for name in (*template.tensors, *_counters(template))}
        return {names[name]: tensor for name, tensor in self._below(entry).items() if name in names}

    def misfit(self, entry: str, template: Template) -> str | None:
        """Return why the tensors at an entry are not the network's; None if they are.

        Others may lie among them, as an auxiliary head, a loss or a single number; but not more of the network's own
        parts, as the blocks of a deeper one.
        """
        state = self.state_at(entry, template)
        if (reason := template.misfit(state)) is not None:
            return reason
        own = {DIGITS.sub("", name.split(".")[0]) for name in map(_without_wrappers, state)}
        known = set(map(_without_wrappers, state))
        for name, tensor in self._below(entry).items():
            if name not in known and tensor.numel() != 1 and DIGITS.sub("", name.split(".")[0]) in own:
                return f"has '{shown(name)}', which {template.network} has not"
        return None

    def beside(self, entry: str, template: Template) -> list[str]:
        """Return in words what is in the checkpoint beside the network's tensors at an entry."""
        start = entry.split(".") if entry else []
        taken = {_joined(entry, _without_wrappers(name)) for name in self.state_at(entry, template)}
        groups: Counter[str] = Counter()
        for name, value in self.leaves.items():
            if name not in taken:
                parts = name.split(".")
                same = next((n for n, (a, b) in enumerate(zip(parts, start, strict=False)) if a != b), len(start))
                groups[".".join(parts[: same + 1])] += isinstance(value, Tensor)
        return [f"{shown(name)} ({count} tensor{'s' * (count > 1)})" if count else shown(name)
                for name, count in groups.items()]  # fmt: skip

    def _below(self, entry: str) -> dict[str, Tensor]:
        start = f"{entry}." if entry else ""
        return {name[len(start) :]: tensor for name, tensor in self.tensors.items() if name.startswith(start)}


def _chosen(source: Path, checkpoint: _Checkpoint, template: Template, entry: str | None) -> str:
    """Return the entry at which a network's weights are: the only one, or the one that was asked for."""
    network, present = template.network, checkpoint.entries(template)
    if not present:
        names = ", ".join(f"'{shown(name)}'" for name in list(checkpoint.tensors)[:NAMED]) or "no tensors at all"
        raise WeightsError(f"{source}: no tensor in it has a name of {network}; it has {names}")
    fits = sorted(each for each in present if checkpoint.misfit(each, template) is None)
    listed = ", ".join(each or WHOLE for each in fits)
    if entry is not None:
        wanted = _without_wrappers(entry).removesuffix(WHOLE)
        if wanted in fits:
            return wanted
        there = f"those of {network} are at: {listed}" if fits else _nearest(checkpoint, template, wanted)
        raise WeightsError(f"{source}: no weights of {network} at entry '{entry}'; {there}")
    if not fits:
        raise WeightsError(f"{source}: no weights of {network} in it; {_nearest(checkpoint, template)}")
    states = [checkpoint.state_at(each, template) for each in fits]
    if any(not torch.equal(states[0][name], other[name]) for other in states[1:] for name in template.tensors):
        raise WeightsError(f"{source}: holds several weights of {network}; choose one with --entry: {listed}")
    return fits[0]


def _nearest(checkpoint: _Checkpoint, template: Template, entry: str | None = None) -> str:
    """Return what hinders the tensors that are most like a network's, or those at an entry."""
    present = checkpoint.entries(template)
    nearest = entry if entry in present else next(iter(present))
    return (
        f"nearest is entry '{nearest or WHOLE}', with {present[nearest]} of {len(template.tensors)} names: it "
        f"{_as_predicate(checkpoint.misfit(nearest, template))}"
    )


def _as_predicate(reason: str | None) -> str:
    return reason if reason and reason.startswith(("lacks", "has ")) else f"is no match: {reason}"


def _plain(source: Path, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of its own memory, in float32 if it is one of floats, and refuse values that are not finite."""
    plain = (tensor.float() if tensor.is_floating_point() else tensor).detach().clone().contiguous()
    if not torch.isfinite(plain).all():
        raise WeightsError(f"{source}: '{name}' holds values that are not finite")
    return plain


def _rows(source: Path, classes: int, given: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Return which of the weights' classes are the wanted ones."""
    if len(given) != classes:
        raise WeightsError(f"{source}: weights for {classes} classes, the file of their names has {len(given)}")
    for name, count in Counter(given).items():
        if count > 1:
            raise WeightsError(f"the file of class names has '{shown(name)}' {count} times")
    place = {name: number for number, name in enumerate(given)}
    for name in wanted:
        if name not in place:
            raise WeightsError(f"the file of class names lacks '{shown(name)}', a class of the prepared data")
    return torch.tensor([place[name] for name in wanted])


def _description(source: Path, network: str, classes: int) -> dict[str, str] | None:
    """Return the metadata of a file that this project wrote, with the number of classes; None of others."""
    described = None
    with contextlib.suppress(WeightsError):
        described = read_architecture(source)
    if described is None or described.network != network:
        return None
    return {METADATA: json.dumps(described._replace(classes=classes)._asdict())}


def _leaves(value: Any, above: tuple[str, ...] = (), around: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield what containers in containers hold, by dotted name; a container within itself once."""
    if id(value) in around:
        return
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield ".".join(above), value
        return
    for key, inner in items:
        yield from _leaves(inner, (*above, str(key)), (*around, id(value)))


def _counters(template: Template) -> set[str]:
    """Return the names of counters that batch norms have beside their variances."""
    ends = ".running_var"
    return {f"{name.removesuffix(ends)}.{COUNTER}" for name in template.tensors if name.endswith(ends)}


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _joined(entry: str, name: str) -> str:
    return f"{entry}.{name}" if entry else name
