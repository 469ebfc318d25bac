"""Keeps the keys of each file, matrix point and --set, and finds the place that sets a key.

In: `Layer`s, which are parsed TOML files. Out: a `Source`, whose last layer wins, and file and line of each key.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ftgen.documents import Document, has, merged, without
from ftgen.errors import KeyPath, Problem
from ftgen.spec.toml import line_of

COMMAND_LINE = "--set"


ALTERNATIVES = (("epochs", "max_steps"),)  # keys of which one replaces the other


class Layer(NamedTuple):
    """One TOML file: its path, its text and its keys."""

    path: Path
    text: str
    document: Document


@dataclass(frozen=True)
class Source:
    """A document, and the files and options that it was merged from."""

    layers: tuple[Layer, ...]  # a file comes after the files that it extends
    document: Document  # all keys, merged
    changes: Document  # keys that --set gives
    point: Document  # keys that the matrix point sets
    below: tuple[KeyPath, ...] = ()  # tables of the matrix that may set those keys
    overrides: dict[KeyPath, Any] = field(default_factory=dict)  # the texts of --set, parsed

    @property
    def path(self) -> Path | None:
        """The file that the user named."""
        return self.layers[-1].path if self.layers else None

    @property
    def stem(self) -> str:
        """The name of that file without `.toml`."""
        return self.layers[-1].path.stem if self.layers else ""

    @property
    def text(self) -> str:
        """The text of every file; the file that the user named comes last."""
        return "".join(layer.text for layer in self.layers)

    def said(self, path: KeyPath) -> tuple[str, int] | None:
        """File and line that set exactly this key; None if nothing sets it."""
        if has(self.changes, path):
            return COMMAND_LINE, 0
        if has(self.point, path):
            return next(filter(None, (self.said((*table, *path)) for table in self.below)), None)
        for layer in reversed(self.layers):
            if has(layer.document, path):
                return str(layer.path), line_of(layer.text, path)
        return None

    def located(self, problem: Problem) -> Problem:
        """The problem with the file and line of its key, or of the nearest table around the key."""
        for length in range(len(problem.where), 0, -1):
            if place := self.said(problem.where[:length]):
                return problem._replace(file=place[0], line=place[1])
        return problem._replace(file=str(self.path or ""))

    def at(self, point: Document, below: tuple[KeyPath, ...]) -> "Source":
        """The source of one matrix point; `below` are the matrix tables that set its keys."""
        document = overridden(overridden(self.document, point), self.changes)
        return replace(self, document=document, point=point, below=below)


def overridden(below: Document, above: Document) -> Document:
    """Both documents in one, `above` wins. A key of ALTERNATIVES in `above` also replaces the other key in `below`."""
    for pair in ALTERNATIVES:
        for key, other in (pair, pair[::-1]):
            if key in above and other not in above:
                below = without(below, (other,))
    return merged(below, above)


def place(said: tuple[str, int]) -> str:
    """`file:line`, or `--set`."""
    return f"{said[0]}:{said[1]}" if said[1] else said[0]
