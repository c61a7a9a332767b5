"""The report as one HTML file that needs nothing else: text, tables, pictures, and the scripts that draw the charts."""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from pipeline.core.text import filled
from pipeline.report.charts import Spec


class Chart(NamedTuple):
    """A chart under its title."""

    title: str
    spec: Spec


class Picture(NamedTuple):
    """A PNG file and what it shows."""

    png: bytes
    text: str


class Row(NamedTuple):
    """Pictures that belong together, with a title, and lines about them."""

    title: str
    pictures: Sequence[Picture]
    lines: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table with a note below."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Charts:
    """Charts with a note below; the note says why if there are none."""

    charts: Sequence[Chart]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Rows of pictures with a note below; the note says why if there are none."""

    rows: Sequence[Row]
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What is on the page, in order."""

    title: str
    compared: str
    finding: Sequence[str]
    table: Table
    quality: Table
    latency: Charts
    accuracy: Charts
    views: Charts
    curves: Charts
    confusion: Pictures
    classes: Table
    disagreements: Pictures
    similarity: Charts
    dataset: Charts
    gallery: Pictures
    maps: Pictures
    facts: Mapping[str, Mapping[str, Any]]
    """By title, by name."""


def render(content: Content) -> str:
    """Return the page as text."""
    return _filled("page.html", {each.name: getattr(content, each.name) for each in fields(content)})


def plots_page() -> str:
    """Return a page that `dvc plots show` fills, for its `plots.html_template`: its own one fetches the scripts."""
    return _filled("plots.html", {})


def _filled(template: str, values: Mapping[str, Any]) -> str:
    return filled("pipeline.report", template, {**values, "vega": _vega()}, {"data_url": _data_url}, html=True)


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


@functools.cache
def _vega() -> str:
    """Return the scripts of Vega, Vega-Lite and Vega-Embed, in the versions that the charts are written for."""
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    script: str = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]
    if "</script" in script:
        raise ValueError("Vega's scripts would end their element")
    return script
