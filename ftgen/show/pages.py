"""Templates to HTML. In: a template's name and its values. Out: a page that needs no other file.

Every value is text until a template says otherwise: escaped, and with whatever does not print spelled out.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ftgen.files import source_folder
from ftgen.units import clean


def page(template: str, **values: Any) -> str:
    """The filled template."""
    return _environment().get_template(template).render(**values)


def pieces(template: str, **values: Any) -> Iterator[str]:
    """The filled template, a piece at a time: what it goes through once may be made meanwhile."""
    return _environment().get_template(template).generate(**values)


def source(name: str) -> str:
    """A template as it is written."""
    return (source_folder("templates") / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(source_folder("templates")),
        autoescape=True,
        finalize=lambda value: clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
