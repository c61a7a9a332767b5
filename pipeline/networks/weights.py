"""Weights of classifiers as safetensors.

A file holds the state of the inner network under its own names, so weights published for a plain network load as they
are; what else is needed to rebuild the classifier (name, image shape, classes, mean, deviation) is in its metadata.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import safetensors
import torch
from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, ValidationError, model_validator
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.core.errors import WeightsError
from pipeline.core.extensions import is_trusted
from pipeline.core.files import local_path, write_atomically
from pipeline.core.network_names import check_network
from pipeline.core.text import first_problem, one_line
from pipeline.machine.device import one_cpu_thread
from pipeline.networks.classifier import Architecture, Classifier, build

METADATA = "architecture"  # key in the metadata of a weights file
CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model", "net", "weights")  # of a state dict in a checkpoint
WRAPPER_PREFIXES = ("_orig_mod.", "module.")  # of torch.compile and DataParallel


def save_weights(model: Classifier, path: Path | str) -> None:
    """Write the network's state and the classifier's architecture to a safetensors file, atomically."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
    # One entry only: safetensors writes several in any order.
    write_atomically(local_path(path), save(state, {METADATA: json.dumps(model.architecture._asdict())}))


@one_cpu_thread()
def load_weights(path: Path | str, architecture: Architecture | None = None) -> Classifier:
    """Read a classifier from a safetensors file, with one CPU thread: forks of this process may need several.

    Args:
        path: the file.
        architecture: what the file must fit; by default, what its own metadata says.

    Raises:
        WeightsError: the file is missing, no safetensors file (a pickle, say), or does not fit the architecture.
    """
    path = local_path(path)
    if architecture is None:
        architecture = read_architecture(path)
    if architecture is None:
        raise WeightsError(f"{path}: no description of its network in the metadata")
    with _opened(path) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    model = build(architecture)
    _load_state(model.network, state, path, architecture.network)
    return model


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: not a readable safetensors file ({error}). Pickled weights (.pt, .pth) can run code and are "
            f"refused: convert a state dict with: python -m stages.teacher convert {path}"
        ) from None


def read_architecture(path: Path) -> Architecture | None:
    """Return the architecture that a weights file describes in its metadata, if it does.

    Raises:
        WeightsError: the file is missing, no safetensors file, or its description is unusable.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if METADATA not in metadata:
        return None
    try:
        given = _Description.model_validate_json(metadata[METADATA])
    except ValidationError as error:
        raise WeightsError(
            f"{path}: no usable description of its network in the metadata: {first_problem(error)}"
        ) from None
    return Architecture(given.network, given.classes, given.image_shape, tuple(given.mean), tuple(given.std))


def convert_state_dict(source: Path, target: Path) -> int:
    """Turn a pickled state dict into a safetensors file, atomically; returns how many tensors it has.

    A state dict under a key of a checkpoint is found, and the prefixes that wrappers for training put before all names
    are taken off. Only tensors and plain containers are unpickled.

    Raises:
        WeightsError: the file is missing, holds other objects or no state dict; or there is a target already.
    """
    if target.exists():
        raise WeightsError(f"{target}: is there already: remove it, or choose another file")
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{source}: no such weights file") from None
    except Exception as error:  # torch raises all kinds on what is no checkpoint
        first = one_line(error)[:200]
        raise WeightsError(
            f"{source}: cannot be loaded as tensors alone ({first}): save model.state_dict() there where you trust it"
        ) from None
    nested = [content[key] for key in CHECKPOINT_KEYS if isinstance(content, dict) and key in content]
    state = next((each for each in [*nested, content] if _is_state_dict(each)), None)
    if state is None:
        raise WeightsError(f"{source}: holds no state dict, neither itself nor under {', '.join(CHECKPOINT_KEYS)}")
    while prefix := next((p for p in WRAPPER_PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    try:
        content = save({name: tensor.clone().contiguous() for name, tensor in state.items()})
    except (RuntimeError, KeyError, NotImplementedError) as error:
        raise WeightsError(f"{source}: holds tensors that are not plain: {one_line(error)}") from None
    write_atomically(target, content)
    return len(state)


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


class _Description(BaseModel):
    """An architecture as a stranger's file gives it."""

    network: str
    classes: int = Field(ge=2)
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    mean: list[FiniteFloat]
    std: list[Annotated[FiniteFloat, Field(gt=0)]]

    @model_validator(mode="after")
    def _is_whole(self) -> _Description:
        if not is_trusted(self.network):
            raise ValueError(
                f"'{self.network}' runs code of yours: such a file is read where the parameters name it "
                "(pipeline.load_params reads them)"
            )
        check_network(self.network)
        if not len(self.mean) == len(self.std) == self.image_shape[0]:
            raise ValueError("mean and deviation must have a value for each channel")
        return self


def _load_state(network: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    # Counters of batches are no weights: some exporters leave them out.
    expected = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    given = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    for key in sorted(expected.keys() | given.keys()):
        if key not in given or key not in expected:
            side = "lacks" if key not in given else "has an unknown tensor"
            raise WeightsError(f"{path}: not the weights of {name}: {side} '{key}'")
        if given[key].shape != expected[key].shape:
            raise WeightsError(
                f"{path}: not the weights of {name}: '{key}' has shape {tuple(given[key].shape)}, "
                f"expected {tuple(expected[key].shape)}"
            )
        if not torch.isfinite(given[key]).all():
            raise WeightsError(f"{path}: '{key}' holds values that are not finite")
    network.load_state_dict(given, strict=False)
