"""Tables for a terminal, by rich. In: a `View`. Out: text, in colour on a terminal.

Names come from file names and logs, which anybody may have written. Rich gets them as Text objects, in which it reads no
markup.
"""

import io
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ftgen.results.keys import View
from ftgen.show.tables import BAD, FAINT, GOOD, RATIO, Cell, Remark, Table, remarks, tabulate
from ftgen.units import clean

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

STATUS_STYLE = {
    "failed": "bold red",
    "invalid": "bold red",
    "ended-badly": "yellow",
    "incomplete": "yellow",
    "complete": "green",
}
TONE_STYLE = {GOOD: "green", BAD: "bold red", FAINT: "dim", "": ""}
NARROW = 15  # characters that a column of figures needs: "published, 16x" and "(GBS=128)" are not broken
WIDE = 10_000  # characters in a line where nothing limits it


def render(view: View, *, width: int | None = None, colour: bool | None = None) -> str:
    """The tables and the remarks in `width` columns; by default those of the terminal, and in a pipe as many as they need.

    `colour` is by default for a terminal only.
    """
    on_terminal = sys.stdout.isatty()
    if width is None:
        width = shutil.get_terminal_size().columns if on_terminal else WIDE
    console = _console(width, on_terminal if colour is None else colour)
    for table in tabulate(view):
        for part in _folded(table, width):
            console.print(_rich_table(part))
            console.print()
        for note in table.notes:
            console.print(_text(Cell(note, FAINT)))
            console.print()
    for remark in remarks(view.runs):
        console.print(_rich_remark(remark), soft_wrap=True)
    return "".join(line.rstrip() + "\n" for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def _folded(table: Table, width: int) -> list[Table]:
    """The table in parts that fit the width, each with the first column. A number is never broken over two lines."""
    labels = max((len(row[0].text) for row in table.rows), default=0) + 4
    some = max(1, (width - min(labels, width // 3)) // (NARROW + 3))
    return [Table(table.title, *(_part(table, start, end))) for start, end in _spans(table.header, some)]


def _spans(header: Sequence[Cell], most: int) -> list[tuple[int, int]]:
    """Parts of at most `most` columns, each as its first column and the one after its last. A ratio stays beside its run."""
    starts = [column for column in range(1, len(header)) if not header[column].text.startswith(RATIO)]
    spans: list[tuple[int, int]] = []
    for start, end in zip(starts, [*starts[1:], len(header)], strict=True):
        if spans and end - spans[-1][0] <= most:
            spans[-1] = spans[-1][0], end
        else:
            spans.append((start, end))
    return spans


def _part(table: Table, start: int, end: int) -> tuple[tuple[Cell, ...], tuple[tuple[Cell, ...], ...]]:
    header, *rows = ((line[0], *line[start:end]) for line in (table.header, *table.rows))
    return header, tuple(rows)


def _console(width: int, colour: bool) -> "Console":
    from rich.console import Console

    return Console(file=io.StringIO(), width=width, force_terminal=colour, highlight=False, emoji=False, markup=False)


def _rich_table(table: Table) -> "RenderableType":
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(title=Text(clean(table.title), style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    first = table.header[0].text
    grid.add_column("" if first == table.title else Text(clean(first)))
    for cell in table.header[1:]:
        grid.add_column(_text(cell), justify="right")
    for row in table.rows:
        grid.add_row(*map(_text, row))
    return grid


def _text(cell: Cell) -> "RenderableType":
    from rich.text import Text

    return Text(clean(cell.text), TONE_STYLE[cell.tone])


def _rich_remark(remark: Remark) -> "RenderableType":
    from rich.text import Text

    text = Text(f"{clean(remark.run)}: ")
    text.append(remark.status, STATUS_STYLE[remark.status])
    return text.append(f": {clean(remark.reason)}\n  {clean(remark.log)}")
