"""Text that people or other programs read: one-line reasons, tables, CSV, parameters by dotted key."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import StringIO
from typing import Any

from pydantic import ValidationError

from pipeline.core.errors import shown

LFS_SIGNATURE = b"version https://git-lfs"
LFS_POINTER = "a pointer of Git LFS, not the file itself: fetch it with: git lfs pull"


def one_line(error: object) -> str:
    """Return an error's message without its line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_problem(error: ValidationError, *above: str) -> str:
    """Return the first thing that is wrong with values of a stranger: its dotted key, below `above`, and why."""
    first = error.errors()[0]
    return f"{shown('.'.join(map(str, (*above, *first['loc']))))}: {first['msg'].removeprefix('Value error, ')}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int | None = None) -> str:
    """Return a Markdown table; cells hold no line breaks and no bars.

    Args:
        header: a name for each column, perhaps empty.
        rows: cells.
        words: so many columns are of words, the others of figures, which stand to the right; by default all.

    Example:
        >>> print(markdown_table(["student", "n"], [["resnet8", "5"]], words=1))
        | student | n |
        |---|---:|
        | resnet8 | 5 |
    """
    words = len(header) if words is None else words
    rule = "|" + "---|" * words + "---:|" * (len(header) - words)
    lines = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([f"| {' | '.join(header)} |", rule, *lines])


def filled(
    package: str, template: str, values: Mapping[str, Any], filters: Mapping[str, Callable[[Any], str]], html: bool
) -> str:
    """Return a Jinja template of a package, filled in; a name that it uses and `values` lack is an error.

    Args:
        package: as `pipeline.report`.
        template: name of the file beside the package's modules.
        values: by name.
        filters: by name.
        html: escape all values.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined  # imported here: only those who publish need it

    environment = Environment(
        loader=PackageLoader(package, "."),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters)
    return environment.get_template(template).render(values)


def csv_text(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return records as CSV; empty for None."""
    text = StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def leaves(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what nested mappings hold, by dotted key.

    Example:
        >>> list(leaves({"attack": {"views": 8}, "seeds": 5}))
        [('attack.views', 8), ('seeds', 5)]
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield above + name, value


def names_in(values: Any, key: str) -> list[str]:
    """Return the names that a dotted key leads through in nested mappings.

    A name may hold dots itself where a mapping has it, as that of a loss `own.losses.Cosine`.

    Example:
        >>> names_in({"mine": {"own.losses.Cosine": {"weight": 1}}}, "mine.own.losses.Cosine.weight")
        ['mine', 'own.losses.Cosine', 'weight']
    """
    parts = key.split(".")
    for count in range(len(parts), 0, -1):
        name = ".".join(parts[:count])
        if isinstance(values, Mapping) and name in values:
            return [name, *(names_in(values[name], ".".join(parts[count:])) if count < len(parts) else [])]
    return parts


def place_of(values: Any, key: str) -> tuple[Any, str]:
    """Return the mapping in which a dotted key's value belongs, and its name there.

    Raises:
        KeyError: a group of the key does not exist.

    Example:
        >>> place_of({"attack": {"views": 8}}, "attack.views")
        ({'views': 8}, 'views')
    """
    *above, name = names_in(values, key)
    for group in above:
        if not isinstance(values.get(group), Mapping):
            raise KeyError(group)
        values = values[group]
    return values, name
