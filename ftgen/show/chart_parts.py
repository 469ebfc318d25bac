"""What charts are made of. In: values, one dictionary a point. Out: parts of Vega-Lite specifications.

Colours are CSS variables of the page, so that one drawing serves light, dark and print.
"""

from collections.abc import Sequence
from textwrap import wrap
from typing import Any, NamedTuple

from ftgen.results.summary import Summary
from ftgen.units import clean, whole

Values = list[dict[str, Any]]

WIDTH, HEIGHT = 360, 180  # pixels of the drawing and of the plot in it: fits a phone
MOST_RUNS = 8  # curves in one chart: as many as there are colours
SERIES = [f"var(--series-{number})" for number in range(1, MOST_RUNS + 1)]

LETTERS = 46  # of a line above a bar or in a legend, in letters of 12 pixels
LINES = 3  # of a label above a bar
LINE_HEIGHT = 15  # pixels

POINT = {"type": "point", "filled": True, "size": 50, "opacity": 0}
LABEL = {"description": {"field": "label", "type": "nominal"}}


class Chart(NamedTuple):
    """A chart, and what it shows in a sentence."""

    title: str
    sentence: str
    spec: dict[str, Any]


def grouped(text: str) -> str:
    """A number with a comma between its thousands, 38,921; any other text as it is."""
    integer, point, fraction = text.partition(".")
    if not integer.isdecimal() or not (integer.isascii() and (not point or fraction.isdecimal())):
        return text
    return f"{int(integer):,}{point}{fraction}"


def thousands(value: float | None) -> str:
    """Cut to a whole number, with a comma between its thousands."""
    return grouped(whole(value))


def shortened(text: str) -> str:
    """At most as long as a line of a legend."""
    text = clean(text)
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"


def by_step(field: str, title: str = "step") -> dict[str, Any]:
    """Across the chart, a key that holds steps, or other whole numbers."""
    return {
        "field": field,
        "type": "quantitative",
        "title": title,
        "axis": {"tickMinStep": 1, "tickCount": 6, "grid": False, "format": ",d"},
        "scale": {"nice": False},
    }


def curve(
    values: Values,
    title: str,
    *,
    zero: bool,
    by: str | None = None,
    names: Sequence[str] = (),
    across: str = "step",
    shown: bool = False,
) -> list[dict[str, Any]]:
    """A line through the values, and a point for each, which shows itself when it is reached, or always if `shown`.

    With `by`, a line for each value of that key; `names` are all there may be, so that colours are the same in two charts.
    """
    y = {"field": "value", "type": "quantitative", "title": title, "scale": {"zero": zero}}
    colour: dict[str, Any] = {"value": SERIES[0]}
    if by:
        drawn = {value[by] for value in values}
        colour = colour_by(by, [name if name in drawn else "" for name in names])
    at = {"x": by_step("step", across), "y": y, "color": colour}
    point = POINT | {"opacity": 1 if shown else 0}
    data = {"values": values}
    line = {"data": data, "mark": {"type": "line", "strokeWidth": 1.5, "aria": False}, "encoding": at}
    return [line, {"data": data, "mark": point, "encoding": at | LABEL}]


def mark_changes(changes: Values) -> list[dict[str, Any]]:
    """An upright line at each `step` where the level changed, in the colour of bad or of good; behind the curves."""
    if not changes:
        return []
    colour = {"condition": {"test": "datum.slower", "value": "var(--bad)"}, "value": "var(--good)"}
    mark = {"type": "rule", "strokeDash": [4, 3], "strokeWidth": 1.5, "aria": False}
    return [{"data": {"values": changes}, "mark": mark, "encoding": {"x": by_step("step", "run"), "color": colour}}]


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
    """Horizontal bars for the first source, each below its `name`; for other sources a stroke where a bar would end."""
    names = list(dict.fromkeys(value["name"] for value in values))
    labels = [_lines(name) for name in names]
    most = max(map(len, labels))
    y = {"field": "name", "type": "nominal", "title": None, "sort": names, "axis": None}
    domain = [source if any(value["source"] == source for value in values) else "" for source in sources]
    x = {"field": "value", "type": "quantitative", "title": title, "axis": {"tickCount": 4, "format": ",~r"}}
    at = {"y": y, "x": x, "color": colour_by("source", domain)} | LABEL
    lower = most * LINE_HEIGHT / 2  # the bar is that much below the middle, its label above it
    bar = {"type": "bar", "size": 14, "yOffset": lower}
    tick = {"type": "tick", "thickness": 4, "size": 20, "yOffset": lower}
    text = {"type": "text", "align": "left", "baseline": "line-bottom", "lineHeight": LINE_HEIGHT, "aria": False}
    layers = [
        {"transform": [{"filter": {"field": "source", "equal": sources[0]}}], "mark": bar, "encoding": at},
        {"transform": [{"filter": {"field": "source", "oneOf": list(sources[1:])}}], "mark": tick, "encoding": at},
    ]
    for name, lines in zip(names, labels, strict=True):
        above = -LINE_HEIGHT * (len(lines) - 1) + lower - 12
        mark = text | {"fontSize": 12, "color": "currentColor", "dy": above}
        encoding = {"y": y, "x": {"value": 0}, "text": {"value": lines}}
        layers.append({"data": {"values": [{"name": name}]}, "mark": mark, "encoding": encoding})
    return layered(layers) | {"data": {"values": values}, "height": {"step": 34 + LINE_HEIGHT * most}}


def _lines(name: str) -> list[str]:
    """A label in lines that are no wider than the chart."""
    return wrap(name, LETTERS, max_lines=LINES, placeholder="…", break_on_hyphens=False) or [""]


def colour_by(field: str, domain: Sequence[str]) -> dict[str, Any]:
    """A colour for each value of a key, in the domain's order; an empty one takes a colour and is not drawn."""
    drawn = {name: colour for name, colour in zip(domain, SERIES * len(domain), strict=False) if name}
    scale = {"domain": list(drawn), "range": list(drawn.values())}
    return {"field": field, "type": "nominal", "scale": scale, "legend": legend(list(drawn))}


def legend(domain: Sequence[str]) -> dict[str, Any] | None:
    """None for a single entry, which says nothing."""
    if len(domain) < 2:
        return None
    return {"title": None, "orient": "bottom", "columns": 1, "labelLimit": WIDTH, "direction": "vertical"}


def layered(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Drawings of one width, so that their letters are of one size."""
    return {"width": WIDTH, "height": HEIGHT, "autosize": {"type": "fit-x", "contains": "padding"}, "layer": layers}
