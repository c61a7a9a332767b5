"""What is found by its name when it is needed: losses of this project, and networks and losses of the user.

The user's modules lie in a folder that the parameters name (`code`). Here they are the package `own`: a network is
`own.<module>.<function>`, a loss `own.<module>.<class>`.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.core.provenance import code_digest

LOSSES = Path(__file__).parents[1] / "losses"
OWN_NAME = re.compile(r"(own\.[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\.([A-Za-z_]\w*)")
_trusted_networks = set[str]()


def use_own_code(folder: Path) -> None:
    """Let `own` be the package of the modules in a folder, from now on, in this process and its forks."""
    place = str(folder.absolute())
    if "own" in sys.modules and sys.modules["own"].__path__ == [place]:
        return
    for name in [name for name in sys.modules if name == "own" or name.startswith("own.")]:
        del sys.modules[name]
    package = ModuleType("own", "The user's modules.")
    package.__path__ = [place]
    sys.modules["own"] = package
    importlib.invalidate_caches()


def trust_own_networks(names: Iterable[str]) -> None:
    """Note that the user's parameters name these networks: weights files may say that they hold one of them."""
    _trusted_networks.update(name for name in names if is_own(name))


def is_trusted(network: str) -> bool:
    """Return whether a weights file may name this network: one of this project, or one that the parameters name."""
    return not is_own(network) or network in _trusted_networks


def is_own(name: str) -> bool:
    """Return whether a name is one of the user's own things."""
    return name.startswith("own.")


def own_modules(*names: str) -> list[str]:
    """Return the user's modules in which these networks or losses are, for digests of code.

    Example:
        >>> own_modules("resnet20", "own.nets.wide_resnet")
        ['own.nets']
    """
    return [match[1] for name in names if (match := OWN_NAME.fullmatch(name))]


def own_object(name: str) -> Any:
    """Return what the user calls so: a function that makes a network, or a loss.

    Raises:
        ValueError: there is no such module or no such thing in it, or the module fails when it is imported.
    """
    match = OWN_NAME.fullmatch(name)
    if not match:
        raise ValueError(f"expected own.<module>.<name>, got '{name}'")
    folder = sys.modules["own"].__path__[0] if "own" in sys.modules else "the folder `code`"
    try:
        module = importlib.import_module(match[1])
    except ModuleNotFoundError as error:
        if error.name and match[1].startswith(error.name):
            raise ValueError(f"no module '{match[1].removeprefix('own.')}' in {folder}, the folder `code`") from None
        raise ValueError(f"{match[1]} cannot be imported: {error}") from None
    except Exception as error:  # the user's code may raise anything
        raise ValueError(f"{match[1]} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found := getattr(module, match[2], None)):
        raise ValueError(f"{module.__file__} has no '{match[2]}'")
    try:
        code_digest(match[1])  # now, so that fingerprints are those of the code that runs
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{match[1]}, or what it imports, cannot be read: {error}") from None
    return found


def find_loss(name: str) -> type[Any]:
    """Return the class of a loss: that of a module in `pipeline.losses`, or one of the user.

    Raises:
        ValueError: there is none.
    """
    if is_own(name):
        found = own_object(name)
        if not isinstance(found, type):
            raise ValueError(f"'{name}' is no loss: derive a class from pipeline.Term")
        return found
    if name not in known_losses():
        raise ValueError(f"unknown loss; known here: {', '.join(known_losses())}, own.<module>.<class>")
    module = importlib.import_module(f"pipeline.losses.{name}")
    (found,) = (
        each
        for each in vars(module).values()
        if isinstance(each, type) and each.__module__ == module.__name__ and hasattr(each, "Parameters")
    )
    return found


def known_losses() -> list[str]:
    """Return the names of this project's losses: the modules of `pipeline.losses`."""
    return sorted(path.stem for path in LOSSES.glob("[a-z]*.py"))
