"""What charts are made of. In: values, one dictionary a point. Out: parts of Vega-Lite specifications.

Colours are CSS variables of the page, so that one drawing serves light, dark and print.
"""

from collections.abc import Sequence
from typing import Any

from ftgen.results.summary import Summary

Values = list[dict[str, Any]]

WIDTH, HEIGHT = 360, 180  # pixels of the drawing and of the plot in it: fits a phone
MOST_RUNS = 8  # curves in one chart: as many as there are colours
SERIES = [f"var(--series-{number})" for number in range(1, MOST_RUNS + 1)]

POINT = {"type": "point", "filled": True, "size": 50, "opacity": 0}
LABEL = {"description": {"field": "label", "type": "nominal"}}


def by_step(field: str) -> dict[str, Any]:
    """Across the chart, a key that holds steps."""
    return {
        "field": field,
        "type": "quantitative",
        "title": "step",
        "axis": {"tickMinStep": 1, "tickCount": 6, "grid": False},
        "scale": {"nice": False},
    }


def curve(values: Values, title: str, *, zero: bool, by: str | None = None) -> list[dict[str, Any]]:
    """A line through the values, and a point for each, which shows itself when it is reached."""
    y = {"field": "value", "type": "quantitative", "title": title, "scale": {"zero": zero}}
    colour = colour_by(by, list(dict.fromkeys(value[by] for value in values))) if by else {"value": SERIES[0]}
    at = {"x": by_step("step"), "y": y, "color": colour}
    data = {"values": values}
    line = {"data": data, "mark": {"type": "line", "strokeWidth": 1.5, "aria": False}, "encoding": at}
    return [line, {"data": data, "mark": POINT, "encoding": at | LABEL}]


def off_scale(values: Values) -> dict[str, Any]:
    """Triangles at the edge for what is beyond it."""
    beyond = [value for value in values if value["off"]]
    mark = {"type": "point", "shape": "triangle-up", "filled": True, "size": 40, "color": "var(--series-1)", "aria": False}
    return {
        "data": {"values": beyond},
        "mark": mark,
        "encoding": {"x": by_step("step"), "y": {"field": "value", "type": "quantitative"}},
    }


def window(run: Summary) -> list[dict[str, Any]]:
    """The steps that are timed, shaded, and their mean as a line; both behind the curve."""
    if run.window_first is None or run.window_last is None:
        return []
    edges = {"first": run.window_first - 0.5, "last": run.window_last + 0.5, "mean": run.step_time_s}
    width = {"x": by_step("first"), "x2": {"field": "last"}}
    shade = {"mark": {"type": "rect", "color": "var(--window)", "aria": False}, "encoding": width}
    mean = {
        "mark": {"type": "rule", "color": "var(--series-2)", "strokeWidth": 2, "aria": False},
        "encoding": {**width, "y": {"field": "mean", "type": "quantitative"}},
    }
    return [layer | {"data": {"values": [edges]}} for layer in ([shade, mean] if run.step_time_s else [shade])]


def bars(values: Values, title: str, sources: Sequence[str]) -> dict[str, Any]:
    """Horizontal bars for the first source, and for each other one a stroke where it would end."""
    names = list(dict.fromkeys(value["name"] for value in values))
    at = {
        "y": {
            "field": "name",
            "type": "nominal",
            "title": None,
            "sort": names,
            "axis": {"labelLimit": 130, "labelExpr": "split(datum.label, ', ')"},
        },
        "x": {"field": "value", "type": "quantitative", "title": title, "axis": {"tickCount": 4}},
        "color": colour_by("source", [source for source in sources if any(v["source"] == source for v in values)]),
    } | LABEL
    first = {
        "transform": [{"filter": {"field": "source", "equal": sources[0]}}],
        "mark": {"type": "bar", "size": 16},
        "encoding": at,
    }
    others = {"field": "source", "oneOf": list(sources[1:])}
    tick = {"type": "tick", "thickness": 4, "size": 28}
    strokes = {"transform": [{"filter": others}], "mark": tick, "encoding": at}
    return layered([first, strokes]) | {"data": {"values": values}, "height": {"step": 44}}


def colour_by(field: str, domain: Sequence[str]) -> dict[str, Any]:
    """A colour for each value of a key, in the domain's order."""
    scale = {"domain": list(domain), "range": SERIES[: len(domain)]}
    return {"field": field, "type": "nominal", "scale": scale, "legend": legend(domain)}


def legend(domain: Sequence[str]) -> dict[str, Any] | None:
    """None for a single entry, which says nothing."""
    if len(domain) < 2:
        return None
    return {"title": None, "orient": "bottom", "columns": 1, "labelLimit": WIDTH, "direction": "vertical"}


def layered(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Drawings of one width, so that their letters are of one size."""
    return {"width": WIDTH, "height": HEIGHT, "autosize": {"type": "fit-x", "contains": "padding"}, "layer": layers}
