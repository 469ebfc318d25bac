"""Results in CSV, safe to open in a spreadsheet. In: a `View`. Out: a header of keys, and a line for each run or group."""

import csv
import io
from typing import Any

from ftgen.results.keys import View, chosen, rows
from ftgen.units import clean

# A spreadsheet takes a text that begins with one of these for a formula; the wide ones count in some languages.
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def render(view: View) -> str:
    """The keys of the JSON results, or those that the view has columns for."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    keys = [field.key for field in chosen(view.fields, view.columns, "columns") or view.fields]
    lines.writerow(keys)
    lines.writerows([_cell(row[key]) for key in keys] for row in rows(view))
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A text that could be a formula gets an apostrophe before it. A number stays as it is, whatever its sign."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        value = "; ".join(value)
    if not isinstance(value, str):
        return value
    text = clean(value)
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text
