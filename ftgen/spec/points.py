"""Turns the document of a spec into the points of its matrix; a spec without a matrix is one point.

In: the `Source` of a spec. Out: `list[Point]`, one for each experiment with its name and its `Source`, and `list[Problem]`.
"""

import re
from typing import NamedTuple

from ftgen.documents import without
from ftgen.errors import Problem, dotted
from ftgen.spec import matrix
from ftgen.spec.source import Source
from ftgen.spec.spec import Matrix
from ftgen.validation import validate

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
POINT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


class Point(NamedTuple):
    """One experiment before it is resolved."""

    name: str
    source: Source
    problems: list[Problem]  # with the name


def points(spec: Source) -> tuple[list[Point], list[Problem]]:
    """Every point of the spec, and every problem of the matrix, with file and line."""
    if "matrix" not in spec.document:
        return [Point(spec.stem, spec.at({}, ()), _bad_names(spec, spec.stem))], []
    table, problems = validate(Matrix, spec.document["matrix"])
    if not table:
        return [], [spec.located(problem._replace(where=("matrix", *problem.where))) for problem in problems]
    described = table.model_dump(exclude_unset=True)
    if lost := [path for path in spec.overrides if path in matrix.varied(described)]:
        hint = f"use --set matrix.product.{dotted(lost[0])}=[...] to change its values"
        return [], [spec.located(Problem(lost[0], "cannot be overridden: the matrix sets it for each point", hint))]
    found, problems = matrix.cells(described, spec.stem, without(spec.document, ("matrix",)))
    sources = ((each.name, spec.at(each.sets, each.below)) for each in found)
    return [Point(name, source, _bad_names(source, name)) for name, source in sources], list(map(spec.located, problems))


def _bad_names(spec: Source, name: str) -> list[Problem]:
    """Problems with the name of the spec's file or of the point. Scripts and jobs have the same name."""
    if not FILE_NAME.fullmatch(spec.stem):
        rule = "a spec's file name must have 1 to 100 letters, digits, '.', '_' and '-', and begin with a letter or digit"
        return [spec.located(Problem((), f"{rule}, found {spec.stem!r}", "rename the file"))]
    if not POINT_NAME.fullmatch(name):
        rule = "must give names of 1 to 100 letters, digits, '.', '_', '+' or '-'"
        return [spec.located(Problem(("matrix", "name"), f"{rule}, found {name!r}", "use other keys in matrix.name"))]
    return []
