"""The charts of the report: figures of the run as Vega-Lite, each as wide as the page lets it be.

Text and lines that are no data have the colour `currentColor`: that of the page around them, light, dark or printed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
from numpy.typing import NDArray

from pipeline.evaluate.statistics import estimate
from pipeline.experiment.figure import COLOURS, OTHERS, number_in
from pipeline.experiment.results import Results

Rows = Sequence[Mapping[str, Any]]
"""Records of a table."""
Spec = dict[str, Any]
"""A chart as Vega-Lite."""

HEIGHT = 260  # pixels
BINS = 40
FADED = 0.08  # opacity of what a click on the legend does not select
PAGE = "currentColor"
CONFIG = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": PAGE,
        "titleColor": PAGE,
        "tickColor": PAGE,
        "domainColor": PAGE,
        "gridColor": PAGE,
        "gridOpacity": 0.12,
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 12,
    },
    "legend": {
        "labelColor": PAGE,
        "titleColor": PAGE,
        "orient": "top",
        "title": None,
        "labelFontSize": 12,
        "symbolOpacity": 1,
    },
    "rule": {"color": PAGE},
    "text": {"color": PAGE},
}


def accuracy_chart(rows: Rows, methods: Sequence[str]) -> Spec:
    """Return accuracy of every seed by method, with mean and standard deviation.

    Args:
        rows: of one student: method, seed, accuracy (fraction).
        methods: in the order of the table.
    """
    return _by_method(rows, methods, "accuracy", "test accuracy", ".1%")


def similarity_chart(rows: Rows, methods: Sequence[str], measure: str, title: str) -> Spec:
    """Return a similarity of every seed by method, with mean and standard deviation; `rows` without undefined ones."""
    return _by_method([row for row in rows if row[measure] is not None], methods, measure, title, ".3f")


def _by_method(rows: Rows, methods: Sequence[str], measure: str, title: str, number: str) -> Spec:
    seeds = 1 + max(row["seed"] for row in rows)
    angle = 0 if len(methods) < 6 else -40
    x = alt.X("method:N", title=None, axis=alt.Axis(labelAngle=angle), scale=alt.Scale(domain=list(methods)))
    axis = alt.Axis(format=number)
    y = alt.Y(f"{measure}:Q", title=title, scale=alt.Scale(zero=False, padding=12), axis=axis)
    shared = {"x": x, "color": _colours(methods), "opacity": _chosen()}
    spreads = _chart([_spread(rows, method, measure) for method in methods]).encode(**shared)
    deviations = spreads.mark_rule(strokeWidth=2).encode(y=alt.Y("low:Q", title=title), y2="high:Q")
    means = spreads.mark_point(shape="stroke", size=900, strokeWidth=3).encode(
        y=alt.Y("mean:Q", title=title),
        tooltip=["method:N", *(alt.Tooltip(f"{name}:Q", format=number) for name in ("mean", "deviation")), "n:Q"],
    )
    kept = [{name: row[name] for name in ("method", "seed", measure)} for row in rows]
    dots = (
        _chart(kept)
        .mark_circle(size=70, stroke=PAGE, strokeWidth=0.6)
        .encode(
            y=y,
            xOffset=alt.XOffset("seed:Q", scale=alt.Scale(domain=[-seeds, 2 * seeds - 1])),
            tooltip=["method:N", "seed:Q", alt.Tooltip(f"{measure}:Q", format=number, title=title)],
            **shared,
        )
    )
    return _finished(alt.layer(deviations.add_params(_choice()), means, dots))


def _spread(rows: Rows, method: str, measure: str) -> dict[str, Any]:
    """Return mean and standard deviation of a method's seeds; without a mean where there is none."""
    known = estimate([[row[measure] for row in rows if row["method"] == method]])
    if known is None:
        return {"method": method, "n": 0}
    deviation = known.deviation or 0.0
    return {
        "method": method,
        "n": known.runs,
        "mean": known.mean,
        "deviation": deviation,
        "low": known.mean - deviation,
        "high": known.mean + deviation,
    }


def curves_chart(rows: Rows, methods: Sequence[str]) -> Spec:
    """Return learning curves of one student: mean accuracy on the validation split over seeds, and its range.

    Args:
        rows: method, seed, epoch, validation_accuracy (fraction).
        methods: in the order of the table.
    """
    epoch = alt.X("epoch:Q", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(zero=False, nice=False))
    base = _chart(_over_seeds(rows)).encode(x=epoch, color=_colours(methods))
    y = alt.Y("mean:Q", title="validation accuracy", scale=alt.Scale(zero=False), axis=alt.Axis(format=".0%"))
    band = base.mark_area(line=False).encode(
        y=alt.Y("lowest:Q", title="validation accuracy"),
        y2="highest:Q",
        opacity=alt.condition(_choice(), alt.value(0.15), alt.value(0.02), empty=True),
    )
    tips = ["method:N", "epoch:Q", *(alt.Tooltip(f"{name}:Q", format=".1%") for name in ("mean", "lowest", "highest"))]
    line = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=16)).encode(y=y, opacity=_chosen(), tooltip=tips)
    return _finished(alt.layer(band.add_params(_choice()), line))


def _over_seeds(rows: Rows) -> list[dict[str, Any]]:
    """Return mean, lowest and highest accuracy of each method and epoch."""
    found: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        found.setdefault((row["method"], row["epoch"]), []).append(row["validation_accuracy"])
    return [
        {
            "method": method,
            "epoch": epoch,
            "mean": float(np.mean(values)),
            "lowest": min(values),
            "highest": max(values),
        }
        for (method, epoch), values in found.items()
    ]


def views_chart(results: Results, student: str) -> Spec:
    """Draw accuracy against the number of views, with standard errors; dashed: the teacher in the loop."""
    rows: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    for cell in results.cells:
        known = estimate(cell.values("accuracy"))
        if cell.labels["student"] != student or known is None:
            continue
        error = known.error or 0.0
        row = {"method": cell.labels["method"], "mean": known.mean, "low": known.mean - error, "n": known.runs}
        row |= {"high": known.mean + error, "views": number_in(cell.labels["views"])}
        (lines if row["views"] is None else rows).append(row)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    base = _chart(rows).encode(
        x=alt.X(
            "views:Q",
            title="views of each image",
            scale=alt.Scale(type="log", base=2, padding=12, nice=False),
            axis=alt.Axis(values=sorted({row["views"] for row in rows})),
        ),
        color=_colours(methods),
        opacity=_chosen(),
    )
    y = alt.Y("mean:Q", title="test accuracy", scale=alt.Scale(zero=False), axis=alt.Axis(format=".0%"))
    tips = ["method:N", "views:Q", alt.Tooltip("mean:Q", format=".1%"), alt.Tooltip("n:Q", title="runs")]
    points = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=60)).encode(y=y, tooltip=tips)
    errors = base.mark_rule(strokeWidth=2).encode(y=alt.Y("low:Q", title="test accuracy"), y2="high:Q")
    loop = (
        _chart(lines)
        .mark_rule(strokeDash=[5, 4], strokeWidth=1.5)
        .encode(y="mean:Q", color=_colours(methods), opacity=_chosen(), tooltip=["method:N", tips[2]])
    )
    return _finished(alt.layer(loop.add_params(_choice()), errors, points))


def latency_chart(rows: Rows, methods: Sequence[str]) -> Spec:
    """Return accuracy against the latency of one image.

    Args:
        rows: method, network, accuracy (fraction), milliseconds.
        methods: in the order of the table.
    """
    time = alt.Tooltip("milliseconds:Q", format=".3g")
    points = (
        _chart(rows)
        .mark_point(size=110, strokeWidth=2.5)
        .encode(
            x=alt.X("milliseconds:Q", title="one image, ms", scale=alt.Scale(type="log", padding=20, nice=False)),
            y=alt.Y(
                "accuracy:Q",
                title="test accuracy",
                scale=alt.Scale(zero=False, padding=12),
                axis=alt.Axis(format=".1%"),
            ),
            color=_colours(methods),
            opacity=_chosen(),
            tooltip=["network:N", "method:N", alt.Tooltip("accuracy:Q", format=".1%"), time],
        )
    )
    return _finished(points.add_params(_choice()))


def histogram(values: NDArray[np.float64], limit: float = 0.0) -> list[dict[str, Any]]:
    """Return counts of values (n,), all at least 0, in equal bins from 0 to the largest, or to a limit if that is more.

    Returns:
        `from`, `to` and `samples` of each bin; none without values.
    """
    if not len(values):
        return []
    counts, edges = np.histogram(values, BINS, (0.0, max(float(values.max()), limit) * 1.02 or 1.0))
    return [
        {"from": float(low), "to": float(high), "samples": int(count)}
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]


def histogram_chart(rows: Rows, title: str, limit: float | None = None) -> Spec:
    """Return the bins of a histogram as bars; a limit is a dashed line."""
    bars = (
        _chart(rows)
        .mark_bar(color=COLOURS["bss"], opacity=0.85)
        .encode(
            x=alt.X("from:Q", bin="binned", title=title),
            x2="to:Q",
            y=alt.Y("samples:Q", title="samples"),
            tooltip=[alt.Tooltip("from:Q", format=".3g"), alt.Tooltip("to:Q", format=".3g"), "samples:Q"],
        )
    )
    if limit is None:
        return _finished(bars)
    rule = _chart([{"limit": limit}]).mark_rule(strokeDash=[4, 3], color=PAGE).encode(x="limit:Q")
    return _finished(alt.layer(bars, rule))


def _chart(rows: Rows) -> alt.Chart:
    data: Any = alt.Data
    return alt.Chart(data(values=list(rows)))


def _colours(methods: Iterable[str]) -> alt.Color:
    others = itertools.cycle(OTHERS)
    domain = list(methods)
    colours = [COLOURS.get(method) or next(others) for method in domain]
    return alt.Color("method:N", scale=alt.Scale(domain=domain, range=colours))


def _choice() -> alt.Parameter:
    return alt.selection_point(name="chosen", fields=["method"], bind="legend", toggle="true")


def _chosen() -> Any:
    return alt.condition(_choice(), alt.value(1), alt.value(FADED), empty=True)


def _finished(chart: Any) -> Spec:
    spec: Spec = chart.properties(width="container", height=HEIGHT).to_dict()
    spec["config"] = CONFIG
    return spec
