"""The imports of this project's modules, read from their source."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "stages")


def path_of(module: str) -> Path:
    """The file of a module, as `pipeline.config`, relative to the root."""
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
    """A module and all that it imports, directly or not."""
    found: set[str] = set()
    waiting = {module}
    while waiting:
        found |= waiting
        waiting = {name for known in waiting for name in imported_by(known)} - found
    return found
