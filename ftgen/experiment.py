"""Files to plans: a spec, a site profile and overrides are read, every problem is located, one `Experiment` comes out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ftgen.errors import KeyPath, Problem, SpecError
from ftgen.plan import Plan, resolve
from ftgen.shape import validate
from ftgen.site import Site
from ftgen.spec import Spec
from ftgen.toml_source import Document, has, line_of, parse_override, read_toml, with_value, without

T = TypeVar("T", Spec, Site)

# Stand in for keys that are missing or of the wrong shape, so that the rules on the other keys can still be checked.
_PLACEHOLDERS: Document = {"scheme": "lora", "precision": "bf16", "gpus": 8}


@dataclass(frozen=True)
class Source:
    """A TOML file, with what --set says over it."""

    path: Path | None
    text: str
    written: Document  # the file's own
    document: Document  # with overrides

    def located(self, problem: Problem) -> Problem:
        """The problem with the file and line that the user would change."""
        if not has(self.written, problem.where) and has(self.document, problem.where):
            return problem._replace(file="--set")
        return problem._replace(file=str(self.path or ""), line=line_of(self.text, problem.where))


@dataclass(frozen=True)
class Experiment:
    """A plan and what it was resolved from."""

    plan: Plan
    spec: Source
    site: Source


def load(spec_path: Path, site_path: Path | None = None, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment that a spec file describes at a site; SpecError with every problem, sorted by file and line."""
    changes = dict(parse_override(text) for text in overrides)
    spec_source, site_source = _read(spec_path, changes), _read(site_path, {})
    spec, spec_problems = _shaped(Spec, spec_source.document, _PLACEHOLDERS)
    site, site_problems = _shaped(Site, site_source.document, {})
    problems = [*spec_problems, *_bad_name(spec_path), *(p._replace(where=("site", *p.where)) for p in site_problems)]
    plan = None
    try:
        plan = resolve(
            spec,
            site,
            name=spec_path.stem,
            spec_text=spec_source.text,
            overrides={".".join(map(str, path)): value for path, value in changes.items()},
        )
    except SpecError as error:
        shapeless = [problem.where for problem in problems]
        problems += [p for p in error.problems if not _touches(p, shapeless)]
    if problems or not plan:
        raise SpecError(*sorted((_locate(p, spec_source, site_source) for p in problems), key=_by_place))
    return Experiment(plan, spec_source, site_source)


def _read(path: Path | None, changes: dict[KeyPath, Any]) -> Source:
    if path is None:
        return Source(None, "", {}, {})
    text, written = read_toml(path)
    document = written
    for key, value in changes.items():
        document = with_value(document, key, value)
    return Source(path, text, written, document)


def _bad_name(path: Path) -> list[Problem]:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", path.stem):
        return []
    return [Problem((), f"a spec's file name must be letters, digits, '.', '_' and '-', found {path.name!r}")]


def _shaped(table: type[T], document: Document, placeholders: Document) -> tuple[T, list[Problem]]:
    """The table without the keys that have problems, for checking the rules on the rest; and all those problems."""
    found, problems = validate(table, document)
    if found:
        return found, problems
    for problem in problems:
        document = without(document, problem.where)
    found, more = _shaped(table, placeholders | document, placeholders)
    return found, problems + more


def _touches(problem: Problem, keys: Sequence[KeyPath]) -> bool:
    """Whether a rule reads one of these keys, or a key inside one of them."""
    read = (problem.where, *problem.also)
    return any(path[: len(key)] == key or key[: len(path)] == path for path in read for key in keys if key)


def _locate(problem: Problem, spec: Source, site: Source) -> Problem:
    if problem.where[:1] != ("site",):
        return spec.located(problem)
    if site.path is None:
        return problem._replace(file=str(spec.path))
    return site.located(problem._replace(where=problem.where[1:]))


def _by_place(problem: Problem) -> tuple[str, int, str]:
    return (problem.file, problem.line, str(problem))
