"""Files to plans: specs, a site profile and overrides are read, every problem is located, `Experiment`s come out."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ftgen import catalogue
from ftgen.documents import Document, without
from ftgen.errors import KeyPath, Problem, SpecError, dotted
from ftgen.plan import memory
from ftgen.plan.plan import Plan, resolve
from ftgen.plan.rules import broken_rules
from ftgen.spec import matrix
from ftgen.spec.site import Site
from ftgen.spec.source import Source, read
from ftgen.spec.spec import Matrix, Spec
from ftgen.spec.toml import parse_override
from ftgen.spec.user_catalogue import own
from ftgen.validation import validate

T = TypeVar("T", Spec, Site)

# Stand in for keys that are missing or of the wrong shape, so that the rules on the other keys can still be checked.
_PLACEHOLDERS: Document = {"scheme": "lora", "precision": "bf16", "gpus": 8}


@dataclass(frozen=True)
class Experiment:
    """A plan and what it was resolved from."""

    plan: Plan
    spec: Source
    site: Source


def load(spec: Path, site: Path | None = None, overrides: Sequence[str] = (), name: str | None = None) -> Experiment:
    """The one experiment of a spec, or the one of this name; SpecError with every problem, sorted by file and line."""
    found = {each.plan.name: each for each in experiments(spec, site, overrides)}
    if name is None and len(found) == 1:
        (name,) = found
    if name not in found:
        what = f"has no experiment {name}" if name else f"has {len(found)} experiments"
        raise SpecError(Problem((), what, f"--name one of {', '.join(found)}", file=str(spec)))
    return found[name]


def load_all(specs: Iterable[Path], site: Path | None = None, overrides: Sequence[str] = ()) -> list[Experiment]:
    """Every experiment of every spec, of a folder all its specs; SpecError with the problems of all."""
    found: dict[str, Experiment] = {}
    problems: list[Problem] = []
    for path in [file for spec in specs for file in (specs_in(spec) if spec.is_dir() else [spec])]:
        try:
            for each in experiments(path, site, overrides):
                if (other := found.get(each.plan.name)) and other.spec.path != path:
                    what = f"{each.plan.name} is the name of an experiment in {other.spec.path} too"
                    problems.append(Problem((), what, "rename one: scripts are named after them", file=str(path)))
                found[each.plan.name] = each
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(*dict.fromkeys(problems))
    return list(found.values())


def load_site(path: Path) -> Site:
    """A site profile by itself; SpecError with every problem of it."""
    source = read(path, {})
    site, problems = _shaped(Site, source.document, {})
    spec = Spec.model_validate(_PLACEHOLDERS | {"gpus": site.gpus_per_node})
    rules = broken_rules(spec, site, catalogue.models().get(spec.model), catalogue.gpus().get(spec.gpu))
    problems += [p._replace(where=p.where[1:]) for p in rules if p.where[:1] == ("site",)]
    if problems:
        raise SpecError(*sorted(dict.fromkeys(map(source.located, problems)), key=_by_place))
    return site


def specs_in(folder: Path) -> list[Path]:
    """The specs of a folder: its TOML files, but for those that only serve others as a base."""
    sources = {path: read(path, {}) for path in sorted(folder.glob("*.toml"))}
    bases = {layer.path.resolve() for source in sources.values() for layer in source.layers[:-1]}
    specs = [path for path, source in sources.items() if _is_whole(source) or path.resolve() not in bases]
    if not specs:
        raise SpecError(Problem((), "has no specs: no file *.toml", file=str(folder)))
    return specs


def experiments(spec_path: Path, site_path: Path | None = None, overrides: Sequence[str] = ()) -> list[Experiment]:
    """The experiment of a spec, or one for each point of its matrix; SpecError with every problem."""
    changes = dict(parse_override(text) for text in overrides)
    spec, site = read(spec_path, changes), read(site_path, {})
    points, problems = _points(spec, changes)
    problems = [spec.located(problem) for problem in problems]
    found: list[Experiment] = []
    for point in points:
        try:
            found.append(_experiment(spec.at(point.sets, point.below), site, point.name, changes))
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(*sorted(dict.fromkeys(problems), key=_by_place))
    return found


def _points(spec: Source, changes: dict[KeyPath, Any]) -> tuple[list[matrix.Point], list[Problem]]:
    stem = spec.layers[-1].path.stem
    if "matrix" not in spec.document:
        return [matrix.Point(stem, {})], []
    table, problems = validate(Matrix, spec.document["matrix"])
    if problems or not table:
        return [], [problem._replace(where=("matrix", *problem.where)) for problem in problems]
    described = table.model_dump(exclude_unset=True)
    if lost := [path for path in changes if path in matrix.varied(described)]:
        hint = f"--set matrix.product.{dotted(lost[0])}=[...] changes its values"
        return [], [Problem(lost[0], "is set by the spec's matrix, point by point", hint)]
    return matrix.points(described, stem, without(spec.document, ("matrix",)))


def _experiment(spec_source: Source, site_source: Source, name: str, changes: dict[KeyPath, Any]) -> Experiment:
    spec, spec_problems = _shaped(Spec, spec_source.document, _PLACEHOLDERS)
    site, site_problems = _shaped(Site, site_source.document, {})
    problems = [
        *spec_problems,
        *_bad_names(spec_source.layers[-1].path.stem, name),
        *(p._replace(where=("site", *p.where)) for p in site_problems),
    ]
    plan = None
    try:
        mine = [own(source) for source in (site_source, spec_source)]
        plan = resolve(
            spec,
            site,
            name=name,
            spec_file=spec_source.layers[-1].path.name,
            spec_text=spec_source.text,
            point=spec_source.point,
            overrides={dotted(path): value for path, value in changes.items()},
            own=catalogue.UserCatalogue(mine[0].models | mine[1].models, mine[0].gpus | mine[1].gpus),
        )
    except SpecError as error:
        shapeless = [problem.where for problem in problems]
        problems += [p for p in error.problems if not _touches(p, shapeless)]
    problems += memory.problems(plan) if plan and not problems else []
    if problems or not plan:
        raise SpecError(*(_locate(p, spec_source, site_source) for p in problems))
    return Experiment(plan, spec_source, site_source)


def _is_whole(source: Source) -> bool:
    """Whether it says what has no default, or what may say it for each point."""
    return "matrix" in source.document or _PLACEHOLDERS.keys() <= source.document.keys()


def _bad_names(stem: str, name: str) -> list[Problem]:
    problems = []
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", stem):
        problems.append(Problem((), f"a spec's file name must be letters, digits, '.', '_' and '-', found {stem!r}"))
    elif not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", name):
        problems.append(Problem(("matrix", "name"), f"must give 1 to 100 letters, digits, '.', '_', '+' or '-': {name!r}"))
    return problems


def _shaped(table: type[T], document: Document, placeholders: Document) -> tuple[T, list[Problem]]:
    """The table without the keys that have problems, for checking the rules on the rest; and all those problems."""
    found, problems = validate(table, document)
    if found:
        return found, problems
    for path in [_there(document, problem.where) for problem in problems]:
        document = without(document, path) if path else document
    found, more = _shaped(table, placeholders | document, placeholders)
    return found, problems + more


def _there(document: Document, path: KeyPath) -> KeyPath:
    """As much of the path as the document has: of a key that is missing, the table that needs it."""
    value: Any = document
    for length, key in enumerate(path):
        if not isinstance(value, dict) or key not in value:
            return path[:length]
        value = value[key]
    return path


def _touches(problem: Problem, keys: Sequence[KeyPath]) -> bool:
    """Whether a rule reads one of these keys, or a key inside one of them."""
    read = (problem.where, *problem.also)
    return any(path[: len(key)] == key or key[: len(path)] == path for path in read for key in keys if key)


def _locate(problem: Problem, spec: Source, site: Source) -> Problem:
    if problem.file:
        return problem
    if problem.where[:1] != ("site",):
        return spec.located(problem)
    if site.path is None:
        return problem._replace(file=str(spec.path))
    return site.located(problem._replace(where=problem.where[1:]))


def _by_place(problem: Problem) -> tuple[str, int, str]:
    return (problem.file, problem.line, str(problem))
