"""Reads specs and site profiles: folders to files, a file and the files that it extends to one document.

In: paths, and the texts of --set. Out: `Source`s, or a `SpecError` that names file and line.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ftgen.documents import Document, merged, with_value
from ftgen.errors import KeyPath, Problem, SpecError, quoted
from ftgen.files import is_folder
from ftgen.spec.source import Layer, Source
from ftgen.spec.spec import Spec, is_one_line
from ftgen.spec.toml import parse_override, read_toml


def find_specs(paths: Iterable[Path]) -> list[Path]:
    """The specs that the user named; a folder stands for every spec in it."""
    return [spec for path in paths for spec in (_specs_in(path) if is_folder(path) else [path])]


def read_source(path: Path | None, overrides: Sequence[str] = ()) -> Source:
    """The file, merged with the files that it extends and with --set; an empty source for no file."""
    said = dict(map(parse_override, overrides))
    changes: Document = {}
    for key, value in said.items():
        changes = with_value(changes, key, value)
    layers = _layers(path, ()) if path else ()
    document: Document = {}
    for layer in layers:
        document = merged(document, layer.document)
    return Source(layers, merged(document, changes), changes, {}, overrides=said)


def named_file(layer: Layer, key: str) -> Path | None:
    """The file that a key of this layer names, relative to the layer's own file; None if it names none."""
    text: Any = layer.document.get(key)
    if not isinstance(text, str):
        return None
    if not is_one_line(text):
        source = Source((layer,), layer.document, {}, {})
        what = f"must be one line without control characters, found {quoted(text)}"
        raise SpecError(source.located(Problem((key,), what, "correct the path")))
    return layer.path.parent / text


def _specs_in(folder: Path) -> list[Path]:
    """The specs of a folder: its TOML files, except those that only serve others as a base."""
    sources = {path: read_source(path) for path in sorted(folder.glob("*.toml"))}
    bases = {layer.path.resolve() for source in sources.values() for layer in source.layers[:-1]}
    specs = [path for path, source in sources.items() if _is_complete(source) or path.resolve() not in bases]
    if not specs:
        raise SpecError(Problem((), "has no specs: no file *.toml", "name a spec, or a folder of specs", file=str(folder)))
    return specs


def _is_complete(source: Source) -> bool:
    """Whether the spec says every key that has no default, or has a matrix, which may say them."""
    needed = {key for key, field in Spec.model_fields.items() if field.is_required()}
    return "matrix" in source.document or needed <= source.document.keys()


def _layers(path: Path, extended_by: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The file and, before it, every file that it extends; `extended_by` has the nearest one first."""
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
        raise SpecError(_at_extends(circle._replace(hint="remove one extends of the circle"), extended_by[0]))
    base_path = named_file(layer, "extends")
    return (*_layers(base_path, (layer, *extended_by)), layer) if base_path else (layer,)


def _at_extends(problem: Problem, layer: Layer) -> Problem:
    """A problem with a base file, located at the `extends` that names it, unless the problem has a line of its own."""
    if problem.line:
        return problem
    where: KeyPath = ("extends",)
    what = problem.what if problem.where == where else f"{problem.file}: {problem.what}"
    line = Source((layer,), layer.document, {}, {}).said(where)
    return problem._replace(where=where, what=what, file=str(layer.path), line=line[1] if line else 0)
