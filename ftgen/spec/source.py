"""Where a document comes from: a file, those it extends, a point of its matrix, --set. In: a path. Out: a `Source`.

The last layer that says a key wins; every key can be traced back to the file and line that said it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ftgen.documents import Document, has, merged, with_value
from ftgen.errors import KeyPath, Problem, SpecError
from ftgen.spec.toml import line_of, read_toml

COMMAND_LINE = "--set"


class Layer(NamedTuple):
    """What one file says."""

    path: Path
    text: str
    document: Document


@dataclass(frozen=True)
class Source:
    """A document and what it was put together from."""

    layers: tuple[Layer, ...]  # a file after those it extends
    document: Document  # all of it
    changes: Document  # what --set says
    point: Document  # what the point of the matrix sets
    below: tuple[KeyPath, ...] = ()  # the tables that may say it

    @property
    def path(self) -> Path | None:
        """The file that was asked for."""
        return self.layers[-1].path if self.layers else None

    @property
    def text(self) -> str:
        """The text of every file, the one that was asked for last."""
        return "".join(layer.text for layer in self.layers)

    def said(self, path: KeyPath) -> tuple[str, int] | None:
        """File and line that say this very key; None where nothing does."""
        if has(self.changes, path):
            return COMMAND_LINE, 0
        if has(self.point, path):
            return next(filter(None, (self.said((*table, *path)) for table in self.below)), None)
        for layer in reversed(self.layers):
            if has(layer.document, path):
                return str(layer.path), line_of(layer.text, path)
        return None

    def located(self, problem: Problem) -> Problem:
        """The problem with the file and line that the user would change: the key's, or of the nearest table around it."""
        for length in range(len(problem.where), 0, -1):
            if place := self.said(problem.where[:length]):
                return problem._replace(file=place[0], line=place[1])
        return problem._replace(file=str(self.path or ""))

    def at(self, point: Document, below: tuple[KeyPath, ...]) -> "Source":
        """The source of one point of the matrix, which stands in one of the tables `below`."""
        document = merged(merged(self.document, point), self.changes)
        return replace(self, document=document, point=point, below=below)


def read(path: Path | None, changes: dict[KeyPath, Any]) -> Source:
    """The file with those it extends, and what --set says over them; SpecError where one cannot be read."""
    layers = _layers(path, ()) if path else ()
    document: Document = {}
    for layer in layers:
        document = merged(document, layer.document)
    said: Document = {}
    for key, value in changes.items():
        said = with_value(said, key, value)
    return Source(layers, merged(document, said), said, {})


def _layers(path: Path, extended_by: tuple[Layer, ...]) -> tuple[Layer, ...]:
    try:
        text, document = read_toml(path)
    except SpecError as error:
        if extended_by:
            raise SpecError(*(_at_extends(problem, extended_by[0]) for problem in error.problems)) from None
        raise
    layer = Layer(path, text, document)
    base = document.get("extends")
    if not isinstance(base, str):
        return (layer,)
    there = path.parent / base
    if any(there.resolve() == each.path.resolve() for each in (layer, *extended_by)):
        raise SpecError(_at_extends(Problem(("extends",), f"goes in a circle: {base}"), layer))
    return (*_layers(there, (layer, *extended_by)), layer)


def _at_extends(problem: Problem, layer: Layer) -> Problem:
    """A problem with a base, told where that base is named, unless it has a line of its own."""
    if problem.line:
        return problem
    where: KeyPath = ("extends",)
    what = problem.what if problem.where == where else f"{problem.file}: {problem.what}"
    return problem._replace(where=where, what=what, file=str(layer.path), line=line_of(layer.text, where))


def place(said: tuple[str, int]) -> str:
    """file:line, or --set."""
    return f"{said[0]}:{said[1]}" if said[1] else said[0]
