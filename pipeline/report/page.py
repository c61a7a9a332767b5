"""The report as one HTML file that needs nothing else: text, tables, pictures, and the scripts that draw the charts."""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


class Content(NamedTuple):
    """What is on the page, in order."""

    title: str
    compared: str
    finding: Sequence[str]
    header: Sequence[str]
    table: Sequence[Sequence[str]]
    table_note: str
    accuracy: Sequence[Chart]
    views: Sequence[Chart]
    views_note: str
    curves: Sequence[Chart]
    curves_note: str
    similarity: Sequence[Chart]
    similarity_note: str
    dataset: Sequence[Chart]
    dataset_note: str
    gallery: Sequence[Row]
    gallery_note: str
    maps: Sequence[Row]
    maps_note: str
    facts: Mapping[str, Mapping[str, Any]]
    """By title, by name."""


def render(content: Content) -> str:
    """Return the page as text."""
    return _filled("page.html", content._asdict())


def plots_page() -> str:
    """Return a page that `dvc plots show` fills, for its `plots.html_template`: its own one fetches the scripts."""
    return _filled("plots.html", {})


def _filled(template: str, values: Mapping[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pipeline.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_url"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return environment.get_template(template).render(values, vega=_vega())


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
