"""What a result follows from: fingerprints of parameters, inputs and code."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "stages")

# Modules that name parameters, check them, move files, start processes: what they decide is in parameters and inputs.
WITHOUT_EFFECT = {f"pipeline.{name}" for name in ("config", "errors", "forks", "provenance", "storage")}


def fingerprint(*parts: Any) -> str:
    """The sha256 of any JSON values (parameters, digests of inputs and of code), in hexadecimal.

    Example:
        >>> fingerprint({"views": 8, "seed": 0}) == fingerprint({"seed": 0, "views": 8})
        True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


@functools.cache
def code_digest(*modules: str, alone: tuple[str, ...] = ()) -> str:
    """The digest of what modules do, with all project modules that they import.

    It is of the source as a process first sees it: what the process runs is not changed by a later edit.

    Comments, docstrings and layout do not count, nor do modules that have no effect on results. The digest is the same
    under every supported version of Python.

    Args:
        modules: names, as `pipeline.attack`.
        alone: names of modules to count without what they import.
    """
    digest = hashlib.sha256()
    for name in sorted(set().union(alone, *map(closure_of, modules)) - WITHOUT_EFFECT):
        tree = ast.parse((ROOT / path_of(name)).read_text())
        digest.update(f"{name} {_shape(tree)}\n".encode())
    return digest.hexdigest()


def _shape(node: object) -> object:
    """A syntax tree as nested tuples, without docstrings and empty fields (which newer versions of Python add)."""
    if isinstance(node, list):
        return tuple(_shape(item) for item in node)
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    body = fields.get("body")
    if isinstance(body, list) and body and _is_docstring(body[0]):
        fields["body"] = body[1:]
    return (type(node).__name__, *((key, _shape(value)) for key, value in fields.items() if value not in (None, [])))


def path_of(module: str) -> Path:
    """The file of a module, as `pipeline.config`, relative to the project's root."""
    return Path(*module.split(".")).with_suffix(".py")


def imported_by(module: str) -> set[str]:
    """The project's modules that a module imports anywhere in its source, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path_of(module)).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        else:
            continue
        found |= {name for name in names if name.split(".")[0] in PACKAGES and (ROOT / path_of(name)).is_file()}
    return found


def closure_of(module: str) -> set[str]:
    """A module and all project modules that it imports, directly or not."""
    found: set[str] = set()
    waiting = {module}
    while waiting:
        found |= waiting
        waiting = {name for known in waiting for name in imported_by(known)} - found
    return found


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
