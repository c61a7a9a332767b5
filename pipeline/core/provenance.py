"""What a result follows from: fingerprints of parameters, inputs and code."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Modules that decide nothing about a result, and why. All others count.
WITHOUT_EFFECT = {
    "pipeline.core.errors": "messages",
    "pipeline.core.files": "moves whole files",
    "pipeline.core.extensions": "finds losses and the user's modules, which are named where they are used",
    "pipeline.core.parameters": "names and checks parameters, whose values are in fingerprints",
    "pipeline.core.provenance": "tells what follows from what",
    "pipeline.core.store": "keeps what is finished",
    "pipeline.core.text": "messages and tables",
    "pipeline.core.timings": "how long stages took",
    "pipeline.machine.cluster": "starts processes",
    "pipeline.machine.forks": "starts processes",
    "pipeline.machine.processor": "what this machine has; as `runtime`, it changes results by rounding at most",
    "pipeline.networks.file_kinds": "messages",
    "pipeline.networks.loading": "refuses a network, or lets it pass",
    "pipeline.networks.template": "says why weights do not fit",
    "pipeline.search.table": "searches by name: the one that was chosen is named where it is used",
    "pipeline.shards.check": "refuses a shard, or lets it pass",
    "pipeline.shards.folder": "fetches bytes, whose digests are checked",
    "pipeline.shards.limits": "refuses what is too large",
    "pipeline.shards.manifest": "refuses a manifest, or lets it pass; its digest is in fingerprints",
}


def fingerprint(*parts: Any) -> str:
    """Return the sha256 of any JSON values (parameters, digests of inputs and of code), in hexadecimal.

    Example:
        >>> fingerprint({"views": 8, "seed": 0}) == fingerprint({"seed": 0, "views": 8})
        True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def code_digest(*modules: str, alone: tuple[str, ...] = ()) -> str:
    """Return the digest of what modules do, with all project modules that they import.

    It is of the source as a process first sees it: what the process runs is not changed by a later edit.

    These do not count: comments, docstrings, layout; the arguments of errors that are raised; where a module lies and
    what it is called; modules of `WITHOUT_EFFECT` and what only they import. The digest is the same under every
    supported version of Python.

    Args:
        modules: names, as `pipeline.attack.columns`.
        alone: names of modules to count without what they import.
    """
    known = dict.fromkeys(WITHOUT_EFFECT, "")
    digests = [_digest_of(name, known) for name in modules]
    digests += [_own_digest(name, dict.fromkeys(imported_by(name), "")) for name in alone]
    return hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()


def _digest_of(module: str, known: dict[str, str]) -> str:
    """Return the digest of a module with those of all that it imports; `known` holds those that were taken before."""
    if module not in known:
        known[module] = ""  # while it is taken: a circle is counted where it was entered
        known[module] = _own_digest(module, known)
    return known[module]


def _own_digest(module: str, known: dict[str, str]) -> str:
    imports, shape = _content_of(module, path_of(module))
    # A name counts with the digest of the module that it comes from, so that the module's own name need not.
    names = sorted([name, bound, _digest_of(source, known)] for source, name, bound in imports)
    return hashlib.sha256(repr((names, shape)).encode()).hexdigest()


@functools.cache
def _content_of(module: str, path: Path) -> tuple[list[tuple[str, str, str]], str]:
    """Return what a module imports of the project, and the digest of the rest of it, as this process first saw it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = list(_imports(module, tree))
    shape = _shape(_WithoutProjectImports().visit(tree))
    return imports, hashlib.sha256(repr(shape).encode()).hexdigest()


class _WithoutProjectImports(ast.NodeTransformer):
    """Take out the imports of project modules; they may stand in another order when a module is renamed."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt | None:
        return None if node.level or _is_of_project(node.module or "") else node

    def visit_Import(self, node: ast.Import) -> ast.stmt | None:
        node.names = [alias for alias in node.names if not _is_of_project(alias.name)]
        return node if node.names else None


def _shape(node: object) -> object:
    """Return a syntax tree as nested tuples: no docstrings, no messages, no empty fields (newer Pythons add some)."""
    if isinstance(node, list):
        return tuple(_shape(item) for item in node)
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Raise):
        return ("Raise", _shape(node.exc.func if isinstance(node.exc, ast.Call) else node.exc))
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Assert):
        fields["msg"] = None
    body = fields.get("body")
    if isinstance(body, list) and body and _is_docstring(body[0]):
        fields["body"] = body[1:]
    return (type(node).__name__, *((key, _shape(value)) for key, value in fields.items() if value not in (None, [])))


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_of_project(module: str) -> bool:
    return module.partition(".")[0] in ("pipeline", "stages", "own")


def path_of(module: str) -> Path:
    """Return the file of a module, as `pipeline.core.files`, or of the user's, as `own.losses`."""
    package, *parts = module.split(".")
    if package == "own":  # a package whose folder the parameters name; it may have packages itself
        place = Path(sys.modules["own"].__path__[0], *parts)
        inside = place / "__init__.py"
        return inside if parts and inside.is_file() else place.with_suffix(".py")
    return Path(ROOT, package, *parts).with_suffix(".py")


def imported_by(module: str) -> set[str]:
    """Return the project's modules that a module imports anywhere in its source, also inside functions."""
    return {source for source, _, _ in _imports(module, ast.parse(path_of(module).read_text(encoding="utf-8")))}


def _imports(module: str, tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Yield the project module, the name in it, and the name here, of every import; '' for a module as a whole."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*package, *filter(None, [node.module])])
            if _is_of_project(source):
                for alias in node.names:
                    yield from _sources_of(source, alias.name, alias.asname or alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _is_of_project(alias.name):
                    yield from _whole(alias.name, alias.asname or "")


def _sources_of(source: str, name: str, bound: str) -> Iterator[tuple[str, str, str]]:
    """Yield where a name comes from: a module, or through the `__init__` of a package, or a module itself."""
    if path_of(f"{source}.{name}").is_file():
        yield f"{source}.{name}", "", bound
    elif path_of(source).is_file():
        yield source, name, bound
    else:
        for origin, inner, outer in _passed_on_by(source):
            if outer == name:
                yield origin, inner, bound


def _whole(module: str, bound: str) -> Iterator[tuple[str, str, str]]:
    """Yield a module, or all that a package passes on."""
    if path_of(module).is_file():
        yield module, "", bound
    else:
        yield from _passed_on_by(module)


def _passed_on_by(package: str) -> Iterator[tuple[str, str, str]]:
    """Yield what the `__init__` of a package imports: its stub says so where names are loaded late."""
    for suffix in (".pyi", ".py"):
        path = path_of(f"{package}.__init__").with_suffix(suffix)
        if path.is_file():
            yield from _imports(f"{package}.__init__", ast.parse(path.read_text(encoding="utf-8")))
            return
