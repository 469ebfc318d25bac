"""Expands the table `matrix` of a spec to its combinations of values.

In: the table `matrix` and the rest of the document, both `dict[str, Any]`. Out: `list[Cell]` and `list[Problem]`. Pure.
"""

import re
from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any, NamedTuple

from ftgen.documents import Document, get, has, leaves, merged, with_value
from ftgen.errors import KeyPath, Problem, dotted

MOST = 1000  # points; a larger matrix is probably a mistake
Values = dict[KeyPath, Any]
Choices = dict[KeyPath, list[Any]]
Tables = tuple[KeyPath, ...]
CROSSED: Tables = (("matrix", "product"), ("matrix", "zip"))


class Cell(NamedTuple):
    """One combination of values: the name of its experiment, and the keys that it sets."""

    name: str
    sets: Document
    below: Tables = ()  # tables of the matrix that may set these keys


def cells(matrix: Document, stem: str, base: Document) -> tuple[list[Cell], list[Problem]]:
    """Every point of a validated matrix, and problems. `base` is the rest of the document; matrix.name may use its keys."""
    choices, zipped = _choices(matrix, "product"), _choices(matrix, "zip")
    if problems := [*_not_lists(choices, "product"), *_not_lists(zipped, "zip"), *_not_alike(choices, zipped)]:
        return [], problems
    count = prod(map(len, choices.values())) * (len(next(iter(zipped.values()))) if zipped else 1)
    if count > MOST:
        return [], [Problem(("matrix",), f"must have at most {MOST} points: it has {count}")]
    crossed = list(_crossed(choices, zipped)) if choices or zipped else []
    excluded = [leaves(each) for each in matrix.get("exclude", [])]
    kept = [(values, CROSSED) for values in crossed if not any(_matches(values, each) for each in excluded)]
    included = enumerate(matrix.get("include", []))
    kept += [(leaves(each), (("matrix", "include", number),)) for number, each in included]
    problems = [
        Problem(("matrix", "exclude", number), "must match a point of the matrix", "use keys and values of the matrix")
        for number, each in enumerate(excluded)
        if not any(_matches(values, each) for values in crossed)
    ]
    if not kept:
        problems.append(Problem(("matrix",), "must have a point", "add product, zip or include"))
    named, more = _named(kept, matrix.get("name"), stem, base)
    return named, problems + more


def varied(matrix: Document) -> set[KeyPath]:
    """The key paths that the matrix sets."""
    included = (path for each in matrix.get("include", []) for path in leaves(each))
    return {*_choices(matrix, "product"), *_choices(matrix, "zip"), *included}


def _choices(matrix: Document, kind: str) -> Choices:
    return leaves(matrix.get(kind, {}))


def _not_lists(choices: Choices, kind: str) -> Iterator[Problem]:
    for path, values in choices.items():
        if not isinstance(values, list) or not values:
            yield Problem(("matrix", kind, *path), "must be a list of at least one value", f"write {dotted(path)} = [ ... ]")


def _not_alike(choices: Choices, zipped: Choices) -> Iterator[Problem]:
    lengths = {path: len(values) for path, values in zipped.items() if isinstance(values, list)}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{dotted(path)} has {length}" for path, length in lengths.items())
        yield Problem(("matrix", "zip"), f"the lists must have the same length: {found}")
    for path in zipped:
        if any(path[: len(other)] == other or other[: len(path)] == path for other in choices):
            yield Problem(("matrix", "zip", *path), "must not be in matrix.product too")


def _crossed(choices: Choices, zipped: Choices) -> Iterator[Values]:
    rows = [dict(zip(zipped, row, strict=True)) for row in zip(*zipped.values(), strict=True)] or [{}]
    for values in product(*choices.values()):
        for row in rows:
            yield dict(zip(choices, values, strict=True)) | row


def _matches(values: Values, pattern: Values) -> bool:
    return all(path in values and values[path] == value for path, value in pattern.items())


def _named(
    kept: list[tuple[Values, Tables]], template: str | None, stem: str, base: Document
) -> tuple[list[Cell], list[Problem]]:
    found: dict[str, Cell] = {}
    problems: list[Problem] = []
    for values, below in kept:
        sets = _document(values)
        name, unknown = _fill(template, merged(base, sets)) if template else (_default_name(stem, values), "")
        if unknown:
            problems.append(Problem(("matrix", "name"), f"must use keys that the spec sets: it does not set {unknown}"))
        elif name in found:
            where: KeyPath = ("matrix", "name") if template else ("matrix",)
            problems.append(Problem(where, f"two points have the same name: {name}", "use all varying keys in matrix.name"))
        found[name] = Cell(name, sets, below)
    return list(found.values()), list(dict.fromkeys(problems))


def _document(values: Values) -> Document:
    document: Document = {}
    for path, value in values.items():
        document = with_value(document, path, value)
    return document


def _default_name(stem: str, values: Values) -> str:
    return "_".join([stem, *(_word(path, value) for path, value in values.items())])


def _fill(template: str, document: Document) -> tuple[str, str]:
    """The template with a value for each key in braces, and the first key that has no value ("" if all have one)."""
    keys = re.findall(r"{(.*?)}", template)
    unknown = next((key for key in keys if not has(document, tuple(key.split(".")))), "")
    return re.sub(r"{(.*?)}", lambda match: _text(get(document, tuple(match[1].split(".")))), template), unknown


def _word(path: KeyPath, value: Any) -> str:
    """The part of a name for one value. A number needs its key before it; the number of GPUs is clear without the key."""
    plain = isinstance(value, str | dict) or path == ("gpus",)
    return _text(value) if plain else f"{path[-1]}-{_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, dict | list):
        return "-".join(map(_text, value.values() if isinstance(value, dict) else value))
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-") or "none"
