"""Summaries to text, one small function a format. In: `Summary`s. Out: what is printed or written to a file.

Names come from file names and logs, which anybody may have written: each format escapes them in its own way, and
no control character gets through.
"""

import csv
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ftgen.summarize import Summary
from ftgen.table import Remark, Table, remarks, tabulate

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# One run in JSON and CSV, key by key; a later ftgen may add some, none is renamed.
KEYS = (
    "experiment",
    "run_id",
    "status",
    "reason",
    "doubts",
    "notes",
    "model",
    "scheme",
    "precision",
    "gpu",
    "gpus",
    "global_batch_size",
    "seq_length",
    "steps",
    "window",
    "step_time_s",
    "tokens_per_s",
    "mfu",
    "days_per_1t_tokens",
    "peak_memory_gib",
    "published_step_time_s",
    "log",
)
FORMULA = ("=", "+", "-", "@")  # what makes a spreadsheet take a text for a formula
MARKDOWN = re.compile(r"[\\`*\[\]<>&|~$#!]|(?<![^\W_])_|_(?![^\W_])")  # an underscore within a word is only that
STATUS_STYLE = {
    "failed": "bold red",
    "invalid": "bold red",
    "ended-badly": "yellow",
    "incomplete": "yellow",
    "complete": "green",
}
NARROW = 15  # columns a figure's column needs: "published, 16x" and "(GBS=128)" stay in one piece


def clean(text: str) -> str:
    """The text with whatever does not print spelled out: control characters, bidirectional marks, lone surrogates."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text)


def to_json(summaries: Sequence[Summary]) -> str:
    """{"runs": [...]}: every figure in full, null for what is not known."""
    return json.dumps({"runs": [_record(summary) for summary in summaries]}, indent=2, allow_nan=False) + "\n"


def to_csv(summaries: Sequence[Summary]) -> str:
    """JSON's keys as a header and a row a run, empty for what is not known; safe to open in a spreadsheet."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(KEYS)
    rows.writerows([_csv_cell(value) for value in _record(summary).values()] for summary in summaries)
    return text.getvalue()


def to_markdown(summaries: Sequence[Summary]) -> str:
    """The tables, and below them a table of what must be said of single runs."""
    tables = [_markdown_table(table.header, table.rows) for table in tabulate(summaries)]
    told = remarks(summaries)
    if told:
        tables.append(_markdown_table(("Run", "Status", "Reason", "Log"), told))
    return "\n".join(tables) or "No run.\n"


def to_terminal(summaries: Sequence[Summary], *, width: int | None = None, colour: bool | None = None) -> str:
    """The tables in `width` columns, by default the terminal's, in colour on a terminal; piped, as wide as they are."""
    on_terminal = sys.stdout.isatty()
    if width is None:
        width = shutil.get_terminal_size().columns if on_terminal else 10_000
    console = _console(width, on_terminal if colour is None else colour)
    for table in tabulate(summaries):
        for part in _folded(table, width):
            console.print(_rich_table(part))
            console.print()
    for remark in remarks(summaries):
        console.print(_rich_remark(remark), soft_wrap=True)
    return "".join(line.rstrip() + "\n" for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


FORMATS: Mapping[str, Callable[[Sequence[Summary]], str]] = {
    "terminal": to_terminal,
    "markdown": to_markdown,
    "csv": to_csv,
    "json": to_json,
}


def _record(summary: Summary) -> dict[str, Any]:
    values = {key: getattr(summary, key) for key in KEYS}
    return {key: _cleaned(value) for key, value in values.items()}


def _cleaned(value: Any) -> Any:
    if isinstance(value, tuple):
        return [clean(text) for text in value]
    return clean(value) if isinstance(value, str) else value


def _csv_cell(value: Any) -> Any:
    if isinstance(value, list):
        value = "; ".join(value)
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(FORMULA) else value


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell if line is lines[1] else _markdown_cell(cell) for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _markdown_cell(text: str) -> str:
    return MARKDOWN.sub(lambda match: "\\" + match.group(), clean(text))


def _folded(table: Table, width: int) -> list[Table]:
    """The table in parts that fit the width, each with the first column: a wrapped number is no number."""
    labels = max(len(row[0]) for row in table.rows) + 4
    some = max(1, (width - min(labels, width // 3)) // (NARROW + 3))
    columns = range(1, len(table.header), some)
    return [Table(table.title, *(_part(table, start, start + some))) for start in columns]


def _part(table: Table, start: int, end: int) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    header, *rows = ((line[0], *line[start:end]) for line in (table.header, *table.rows))
    return header, tuple(rows)


def _console(width: int, colour: bool) -> "Console":
    from rich.console import Console

    return Console(file=io.StringIO(), width=width, force_terminal=colour, highlight=False, emoji=False, markup=False)


def _rich_table(table: Table) -> "RenderableType":
    """Text objects throughout: rich reads no markup in those."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(title=Text(clean(table.title), style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    grid.add_column("")
    for title in table.header[1:]:
        style = "dim" if title.startswith("published") else ""
        grid.add_column(Text(clean(title)), justify="right", style=style)
    for row in table.rows:
        grid.add_row(*(Text(clean(cell)) for cell in row))
    return grid


def _rich_remark(remark: Remark) -> "RenderableType":
    from rich.text import Text

    text = Text(f"{clean(remark.run)}: ")
    text.append(remark.status, STATUS_STYLE[remark.status])
    return text.append(f": {clean(remark.reason)}\n  {clean(remark.log)}")
