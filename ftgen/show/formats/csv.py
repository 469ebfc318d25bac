"""Results for other programs: JSON and CSV. In: a `View`. Out: text. `fields` says which keys there are."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from ftgen.results.compare import FORMAT
from ftgen.results.keys import View, chosen, rows
from ftgen.units import clean

# What makes a spreadsheet take a text for a formula; the wide ones do so in some languages.
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def to_json(view: View) -> str:
    """Every figure in full, null for what is not known; as `ftgen schema --results` says."""
    baseline = {"name": view.baseline.name, "tolerance": view.baseline.tolerance} if view.baseline else None
    document = {
        "format": FORMAT,
        "baseline": baseline,
        "runs": rows(view._replace(group=False, sort=() if view.group else view.sort)),
        "groups": rows(view._replace(group=True, sort=view.sort if view.group else ())),
    }
    return json.dumps(_cleaned(document), indent=2, allow_nan=False) + "\n"


def to_csv(view: View) -> str:
    """JSON's keys, or those asked for, as a header, and a row a run; safe to open in a spreadsheet."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    keys = [field.key for field in chosen(view.fields, view.columns, "columns") or view.fields]
    lines.writerow(keys)
    lines.writerows([_csv_cell(row[key]) for key in keys] for row in rows(view))
    return text.getvalue()


def _cleaned(value: Any) -> Any:
    """The document with every text in it cleaned; keys are ours."""
    if isinstance(value, dict):
        return {key: _cleaned(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_cleaned(inner) for inner in value]
    return clean(value) if isinstance(value, str) else value


def _csv_cell(value: Any) -> Any:
    """Text that could be a formula gets an apostrophe before it; numbers are never quoted, whatever their sign."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        value = "; ".join(value)
    if not isinstance(value, str):
        return value
    text = clean(value)
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text
