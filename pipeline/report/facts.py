"""Facts of a run: how long its stages took here, versions, digests and parameters."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from pipeline.core.parameters import Params
from pipeline.core.text import leaves
from pipeline.evaluate.latency import device_name
from pipeline.shards.manifest import Manifest

PACKAGES = ("boundary-distillation", "torch", "torchvision", "numpy", "h5py")

Facts = dict[str, dict[str, Any]]
"""By title, by name."""


def facts_of(params: Params, manifest: Manifest, device: torch.device) -> Facts:
    """Return what a run followed from. No times: the page is the same bytes whenever it is made on a machine."""
    values = params.model_dump(mode="json", exclude={"runtime", "method", "card"})
    facts: Facts = {
        "Machine and versions": _versions(device),
        "Digests": {
            "samples": manifest.fingerprint,
            "teacher": manifest.digests.teacher,
            "training split": manifest.digests.train,
        },
        "Students": _flat({name: value for name, value in values.items() if not isinstance(value, dict)}),
    }
    facts |= {f"Parameters: {name}": _flat(value) for name, value in values.items() if isinstance(value, dict)}
    for method in params.methods:
        facts[f"Method: {method}"] = _flat(params.method[method].model_dump(mode="json", exclude_none=True))
    return facts


def _flat(values: Mapping[str, Any]) -> dict[str, str]:
    """Return nested parameters by dotted name, as they stand in the parameter file."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in leaves(values)}


def _versions(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": device_name(device),
        "Python": platform.python_version(),
        "system": platform.platform(terse=True),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
