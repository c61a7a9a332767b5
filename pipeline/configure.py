"""Changing params.yaml and keeping its comments: presets and single values laid over it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from pipeline.core.errors import ParameterError
from pipeline.core.files import as_utf8, local_path, write_atomically
from pipeline.core.parameters import check_params
from pipeline.core.text import leaves, names_in, one_line


def configure(path: Path, overlays: list[str]) -> list[str]:
    """Lay presets and single values over a parameter file, check the result and write it.

    Args:
        path: the parameter file.
        overlays: in order, names of YAML files, or values as `attack.views=16`.

    Returns:
        What changed, as `attack.views: 8 -> 16`.

    Raises:
        ParameterError: a file is missing or no YAML, or the result has an unknown or bad parameter; nothing is written.
    """
    document = _read(path)
    before = dict(leaves(document))
    for overlay in overlays:
        _lay_over(document, _values_of(overlay, document), overlay)
    try:
        values = _plain(document)
    except (YAMLError, ValueError) as error:
        raise ParameterError(f"{' '.join(overlays)}: not valid YAML: {one_line(error)}") from None
    check_params(values, "with " + " ".join(overlays))
    after = dict(leaves(document))
    keys = list(after) + [key for key in before if key not in after]
    changes = [
        f"{key}: {_shown(before.get(key))} -> {_shown(after.get(key))}"
        for key in keys
        if before.get(key) != after.get(key)
    ]
    if changes:
        text = io.StringIO()
        _yaml().dump(document, text)
        write_atomically(path, text.getvalue())
    return changes


def _yaml() -> YAML:
    yaml = YAML()
    yaml.width = 120
    yaml.preserve_quotes = True
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml


def _read(path: Path) -> Any:
    try:
        document = _parsed(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ParameterError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ParameterError(f"{path}: not valid YAML: no text") from None
    if not isinstance(document, CommentedMap):
        raise ParameterError(f"{path}: expected a mapping of parameters")
    return document


def _parsed(text: str, source: str) -> Any:
    try:
        return _yaml().load(text)
    except (YAMLError, ValueError) as error:
        raise ParameterError(f"{source}: not valid YAML: {one_line(error)}") from None


def _values_of(overlay: str, document: Any) -> Any:
    """Return the nested values of a preset's file or of `key=value`, a key of the document."""
    key, equals, text = overlay.partition("=")
    if not equals or local_path(overlay).is_file():
        return _read(local_path(overlay))
    if " #" in text and text.strip()[0] not in "'\"":
        raise ParameterError(f"{overlay}: put the value in quotes: after ' #', YAML reads a comment")
    value = _parsed(as_utf8(text), overlay)
    for name in reversed(names_in(document, key.strip())):
        value = {name: value}
    return value


def _lay_over(document: Any, values: Mapping[str, Any], source: str, at: str = "") -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(document.get(key), Mapping):
            _lay_over(document[key], value, source, f"{at}{key}.")
        elif isinstance(document.get(key), Mapping):
            raise ParameterError(f"{source}: {at}{key}: is a group of parameters; expected {at}{key}.NAME=VALUE")
        else:
            document[key] = _one_line(value) if isinstance(value, list) else value


def _one_line(values: list[Any]) -> CommentedSeq:
    """Return a list of its own, so that YAML writes no references to another one."""
    sequence = CommentedSeq(values)
    sequence.fa.set_flow_style()
    return sequence


def _plain(document: Any) -> Any:
    """Return the same values without what YAML knows about them."""
    text = io.StringIO()
    _yaml().dump(document, text)
    return YAML(typ="safe", pure=True).load(text.getvalue())


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
