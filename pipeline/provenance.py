"""What a result follows from: fingerprints of parameters, inputs and code."""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "stages")

# Modules that say what to do, check it, and move files: what they decide is in the parameters and inputs.
WITHOUT_EFFECT = {f"pipeline.{name}" for name in ("config", "errors", "provenance", "runtime", "storage")}


def fingerprint(*parts: Any) -> str:
    """The sha256 of any JSON values (parameters, digests of inputs and of code), in hexadecimal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def code_digest(*modules: str) -> str:
    """The digest of what modules do, with all project modules that they import.

    Comments, docstrings and layout do not count, nor do modules that have no effect on results.

    Args:
        modules: names, as `pipeline.attack`.
    """
    digest = hashlib.sha256()
    for name in sorted(set().union(*map(closure_of, modules)) - WITHOUT_EFFECT):
        tree = ast.parse((ROOT / path_of(name)).read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and _is_docstring(body[0]):
                body[:1] = [] if len(body) > 1 else [ast.Pass()]
        digest.update(f"{name}\n{ast.unparse(tree)}\n".encode())
    return digest.hexdigest()


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
