"""Charts to SVG, by Vega-Lite as vl-convert carries it: no browser, no network, no script left in the drawing."""

import json
import re
from typing import Any

from markupsafe import Markup, escape

from ftgen.show.chart_parts import Chart
from ftgen.units import clean

CONFIG: dict[str, Any] = {
    "font": "sans-serif",
    "background": None,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "gridColor": "var(--grid)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "aria": False,
    },
    "axisY": {"minExtent": 44, "titlePadding": 10},  # a browser's letters may be wider than those that are measured here
    "legend": {
        "labelColor": "currentColor",
        "labelFontSize": 12,
        "aria": False,
        "symbolOpacity": 1,
        "layout": {"bottom": {"anchor": "start", "direction": "vertical"}},
    },
}
# Groups of marks that a screen reader could name nothing of: what they hold has labels of its own.
NAMELESS = re.compile(r' role="graphics-\w+" aria-roledescription="[^"]*mark container"')
SIZE = re.compile(r'^<svg ([^>]*?) width="[\d.]+" height="[\d.]+" (viewBox="[^"]+")>')


def svg(chart: Chart) -> Markup:
    """The drawing as it stands in a page."""
    import vl_convert  # no other command needs it

    text: str = vl_convert.vegalite_to_svg(
        json.dumps(chart.spec | {"config": CONFIG}), vl_version="6.4", allowed_base_urls=[]
    )
    title = escape(clean(f"{chart.title}: {chart.sentence}"))
    drawn, times = SIZE.subn(lambda match: f'<svg {match[1]} {match[2]} role="img" aria-label="{title}">', text)
    if not times:
        raise ValueError(f"no SVG as expected: {text[:200]}")
    return Markup(NAMELESS.sub("", drawn))  # noqa: S704, vl-convert escapes what it is given; a test holds it to that
