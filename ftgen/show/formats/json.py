"""Results in JSON. In: a `View`. Out: a document that follows the schema of `ftgen schema --results`."""

import json
from collections.abc import Sequence
from typing import Any

from ftgen.results.compare import FORMAT
from ftgen.results.keys import View, rows
from ftgen.units import clean


def render(view: View) -> str:
    """Every figure with all its digits; null for a figure that is not known."""
    baseline = {"name": view.baseline.name, "tolerance": view.baseline.tolerance} if view.baseline else None
    document = {
        "format": FORMAT,
        "baseline": baseline,
        "runs": rows(view._replace(group=False, sort=() if view.group else view.sort)),
        "groups": rows(view._replace(group=True, sort=view.sort if view.group else ())),
    }
    return json.dumps(_cleaned(document), indent=2, allow_nan=False) + "\n"


def _cleaned(value: Any) -> Any:
    """The document with control characters spelled out in every text. The keys are ftgen's own."""
    if isinstance(value, dict):
        return {key: _cleaned(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_cleaned(inner) for inner in value]
    return clean(value) if isinstance(value, str) else value
