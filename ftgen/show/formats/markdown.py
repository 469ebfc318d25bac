"""Tables in Markdown. In: a `View`. Out: tables with pipes, as GitHub reads them.

Names come from file names and logs, which anybody may have written. Every character that Markdown or HTML reads as markup
is escaped, and control characters are spelled out.
"""

import re
from collections.abc import Sequence

from ftgen.results.keys import View
from ftgen.show.tables import REMARKS, Table, remarks, tabulate
from ftgen.units import clean

# An underscore within a word is no markup.
MARKUP = re.compile(r"[\\`*\[\]<>&|~$#!]|(?<![^\W_])_|_(?![^\W_])")


def render(view: View) -> str:
    """The tables, and a table of the remarks below them."""
    parts = [_table(table) for table in tabulate(view)]
    if told := remarks(view.runs):
        parts.append(_lines(REMARKS, told))
    return "\n".join(parts) or "No run.\n"


def _table(table: Table) -> str:
    text = _lines([cell.text for cell in table.header], [[cell.text for cell in row] for row in table.rows])
    return text + "".join(f"\n{_escaped(note)}\n" for note in table.notes)


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [map(_escaped, header), ["---"] * len(header), *(map(_escaped, row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escaped(text: str) -> str:
    return MARKUP.sub(lambda match: "\\" + match.group(), clean(text))
