"""Weights of classifiers as safetensors.

A file holds the state of the inner network under its own names, so weights published for a plain network load as they
are; what else is needed to rebuild the classifier (name, image shape, classes, mean, deviation) is in its metadata.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
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
from pipeline.networks.file_kinds import AGAIN, foreign_kind, is_pickle
from pipeline.networks.template import COUNTER, other_sizes, type_problem

METADATA = "architecture"  # key in the metadata of a weights file


def save_weights(model: Classifier, path: Path | str) -> None:
    """Write the network's state and the classifier's architecture to a safetensors file, atomically."""
    state = {name: tensor.detach().cpu() for name, tensor in model.network.state_dict().items()}
    # One entry only: safetensors writes several in any order.
    write_atomically(local_path(path), save(apart(state), {METADATA: json.dumps(model.architecture._asdict())}))


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no memory, as safetensors wants them: those of layers with tied weights do."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


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
    model = build(architecture)
    _load_state(model.network, read_state(path), path, architecture)
    return model


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        WeightsError: the file is missing, or no safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.exists():
        raise WeightsError(f"{path}: no such weights file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: {_why_unreadable(path, error)}") from None


def _why_unreadable(path: Path, error: Exception) -> str:
    """Return what a file is that safetensors cannot read, and what to do."""
    if path.name.endswith(".index.json"):
        return f"a list of other files: make one of them with: python -m stages.teacher convert {path}"
    if kind := foreign_kind(path):
        return kind
    reason = f"not a readable safetensors file ({one_line(error)})"
    if is_pickle(path):
        return (
            f"{reason}. Pickled weights (.pt, .pth) can run code and are refused: convert a state dict with: "
            f"python -m stages.teacher convert {path}"
        )
    return f"{reason}: {AGAIN}"


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


def _load_state(network: nn.Module, state: dict[str, Tensor], path: Path, architecture: Architecture) -> None:
    # Counters of batches are no weights: some exporters leave them out.
    expected = {key: value for key, value in network.state_dict().items() if not key.endswith(COUNTER)}
    given = {key: value for key, value in state.items() if not key.endswith(COUNTER)}
    refused = f"{path}: not the weights of {architecture.network}"
    for key in sorted(expected.keys() ^ given.keys()):
        raise WeightsError(
            f"{refused}: {'lacks' if key in expected else 'has an unknown tensor'} '{key}'; where they are in there "
            f"under other names, or among others, this finds them: python -m stages.teacher convert {path}"
        )
    for key in sorted(expected):
        if given[key].shape != expected[key].shape:
            if sizes := other_sizes(architecture, given):
                raise WeightsError(f"{path}: weights of {architecture.network} {sizes}")
            raise WeightsError(
                f"{refused}: '{key}' has shape {tuple(given[key].shape)}, expected {tuple(expected[key].shape)}"
            )
        if problem := type_problem(expected[key], given[key]):
            raise WeightsError(f"{path}: '{key}' {problem}")
        if expected[key].is_floating_point():
            given[key] = given[key].float()
        if not torch.isfinite(given[key]).all():
            raise WeightsError(f"{path}: '{key}' holds values that are not finite")
    network.load_state_dict(given, strict=False)
