"""Reads specs and site profiles, with the files that they extend, into one document each.

In: `Path`s, and the texts of --set (`Sequence[str]`). Out: a `Source`, or a `SpecError` with file and line.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ftgen.documents import Document, with_value
from ftgen.errors import KeyPath, Problem, SpecError, quoted
from ftgen.files import is_folder
from ftgen.spec.source import Layer, Source, overridden
from ftgen.spec.spec import Spec, is_one_line
from ftgen.spec.toml import parse_override, read_toml


def find_specs(paths: Iterable[Path]) -> list[Path]:
    """The specs that the user named; a folder stands for every spec in it."""
    return [spec for path in paths for spec in (_specs_in(path) if is_folder(path) else [path])]


def read_source(path: Path | None, overrides: Sequence[str] = ()) -> Source:
    """The document of the file, of the files that it extends and of --set. Without a file, only of --set."""
    said = dict(map(parse_override, overrides))
    changes: Document = {}
    for key, value in said.items():
        changes = with_value(changes, key, value)
    layers = _layers(path, ()) if path else ()
    document: Document = {}
    for layer in layers:
        document = overridden(document, layer.document)
    return Source(layers, overridden(document, changes), changes, {}, overrides=said)


def named_file(layer: Layer, key: str) -> Path | None:
    """The path that a key of this layer gives, relative to the layer's file; None if the layer has no such path."""
    text: Any = layer.document.get(key)
    if not isinstance(text, str):
        return None
    if not is_one_line(text):
        source = Source((layer,), layer.document, {}, {})
        what = f"must be one line without control characters, found {quoted(text)}"
        raise SpecError(source.located(Problem((key,), what, "correct the path")))
    return layer.path.parent / text


def _specs_in(folder: Path) -> list[Path]:
    """The specs of a folder: its TOML files, except incomplete files that other specs extend."""
    sources = {path: read_source(path) for path in sorted(folder.glob("*.toml"))}
    bases = {layer.path.resolve() for source in sources.values() for layer in source.layers[:-1]}
    specs = [path for path, source in sources.items() if _is_complete(source) or path.resolve() not in bases]
    if not specs:
        raise SpecError(Problem((), "must have a file *.toml", "name a spec or a folder of specs", file=str(folder)))
    return specs


def _is_complete(source: Source) -> bool:
    """Whether the spec sets every key that has no default, or has a matrix, which may set these keys."""
    needed = {key for key, field in Spec.model_fields.items() if field.is_required()}
    return "matrix" in source.document or needed <= source.document.keys()


def _layers(path: Path, extended_by: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The file, after every file that it extends. `extended_by` are the files that extend it, the nearest first."""
    try:
        text, document = read_toml(path)
    except SpecError as error:
        if extended_by:
            raise SpecError(*(_at_extends(problem, extended_by[0]) for problem in error.problems)) from None
        raise
    layer = Layer(path, text, document)
    if any(path.resolve() == each.path.resolve() for each in extended_by):
        base = extended_by[0].document["extends"]
        circle = Problem(("extends",), f"must not lead back to a file that extends this one, found {quoted(base)}")
        raise SpecError(_at_extends(circle._replace(hint="remove one of the extends keys in the circle"), extended_by[0]))
    base_path = named_file(layer, "extends")
    return (*_layers(base_path, (layer, *extended_by)), layer) if base_path else (layer,)


def _at_extends(problem: Problem, layer: Layer) -> Problem:
    """The problem of a base file. If it has no line, it gets the line of the `extends` that names the file."""
    if problem.line:
        return problem
    where: KeyPath = ("extends",)
    what = problem.what if problem.where == where else f"{problem.file}: {problem.what}"
    line = Source((layer,), layer.document, {}, {}).said(where)
    return problem._replace(where=where, what=what, file=str(layer.path), line=line[1] if line else 0)
