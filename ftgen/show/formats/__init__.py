"""A view to text, one name a format. In: a `View`. Out: what is printed or written to a file."""

from collections.abc import Callable, Mapping

from ftgen.results.keys import View
from ftgen.show.formats.csv import to_csv, to_json
from ftgen.show.formats.latex import MARKUPS
from ftgen.show.formats.terminal import WIDE, terminal
from ftgen.show.tables import remarks, tabulate


def to_terminal(view: View, *, width: int | None = None, colour: bool | None = None) -> str:
    """Tables and remarks for a terminal of `width` columns, by default the one there is."""
    return terminal(tabulate(view), remarks(view.runs), width=width, colour=colour)


def to_text_file(view: View) -> str:
    """The same for a file: as wide as the tables are, without colour."""
    return to_terminal(view, width=WIDE, colour=False)


def _marked_up(name: str) -> Callable[[View], str]:
    return lambda view: MARKUPS[name](tabulate(view), remarks(view.runs))


FORMATS: Mapping[str, Callable[[View], str]] = {
    "terminal": to_terminal,
    "markdown": _marked_up("markdown"),
    "csv": to_csv,
    "json": to_json,
    "html": _marked_up("html"),
    "latex": _marked_up("latex"),
}
