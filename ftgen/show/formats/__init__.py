"""Output formats: one module a format, each with a function `render` from a `View` to text.

In: a format's name and a `View`. Out: text. A module is imported when its format is asked for: HTML alone needs Jinja, and
the terminal alone needs rich. A new format is a new module here and its name in `FORMATS`.
"""

from collections.abc import Callable
from importlib import import_module

from ftgen.results.keys import View

FORMATS = ("terminal", "markdown", "csv", "json", "html", "latex")


def render(name: str, view: View, *, to_file: bool = False) -> str:
    """The view as text in the format `name`, which is one of `FORMATS`; in a file it has no colour and no limit of width."""
    if name == "terminal":
        from ftgen.show.formats import terminal

        return terminal.render(view, width=terminal.WIDE if to_file else None, colour=False if to_file else None)
    write: Callable[[View], str] = import_module(f"{__name__}.{name}").render
    return write(view)
