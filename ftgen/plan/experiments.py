"""Resolves the specs that the user names to experiments, and locates every problem.

In: `Path`s of specs (files or folders) and of a site profile, the texts of --set. Out: an `Experiment` for each point of
each spec, or a `SpecError` with all problems, those of each spec sorted by line. A spec passes these stages:

    files -> `Source` (ftgen.spec.read) -> `Point`s (ftgen.spec.points) -> `Plan`s (ftgen.plan.resolve)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftgen import catalogue
from ftgen.errors import KeyPath, Problem, SpecError, dotted
from ftgen.plan import memory
from ftgen.plan.plan import Plan
from ftgen.plan.resolve import resolve
from ftgen.plan.rules import broken_rules
from ftgen.spec.chat_template import read_chat_template
from ftgen.spec.points import Point, points
from ftgen.spec.read import find_specs, read_source
from ftgen.spec.site import Site
from ftgen.spec.source import Source
from ftgen.spec.spec import Spec
from ftgen.spec.user_catalogue import read_user_catalogue
from ftgen.validation import validate_partly

# Values for required keys that are missing or wrong, so that the rules for the other keys can be checked.
_PLACEHOLDERS = {"scheme": "lora", "precision": "bf16", "gpus": 8}


@dataclass(frozen=True)
class Experiment:
    """A plan, with the spec and the site profile that it was resolved from."""

    plan: Plan
    spec: Source
    site: Source


def load_all(specs: Iterable[Path], site: Path | None = None, overrides: Sequence[str] = ()) -> list[Experiment]:
    """The experiments of all specs; a folder stands for the specs in it. SpecError with the problems of all specs."""
    found: dict[str, Experiment] = {}
    problems: list[Problem] = []
    for path in find_specs(specs):
        try:
            for each in load(path, site, overrides):
                if (other := found.get(each.plan.name)) and other.spec.path != path:
                    what = f"the name of an experiment must be unique: {other.spec.path} also has {each.plan.name}"
                    problems.append(Problem((), what, "rename one: both would write the same script", file=str(path)))
                found[each.plan.name] = each
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(*dict.fromkeys(problems))
    return list(found.values())


def load_one(spec: Path, site: Path | None = None, overrides: Sequence[str] = (), name: str | None = None) -> Experiment:
    """The experiment of a spec that has this name, or the only one; SpecError with every problem."""
    found = {each.plan.name: each for each in load(spec, site, overrides)}
    if name is None and len(found) == 1:
        (name,) = found
    if name not in found:
        what = f"has no experiment {name}" if name else f"has {len(found)} experiments"
        raise SpecError(Problem((), what, f"use --name with one of {', '.join(found)}", file=str(spec)))
    return found[name]


def load(spec: Path, site: Path | None = None, overrides: Sequence[str] = ()) -> list[Experiment]:
    """The experiments of one spec, one for each point of its matrix; SpecError with every problem."""
    spec_source, site_source = read_source(spec, overrides), read_source(site)
    found, problems = points(spec_source)
    experiments: list[Experiment] = []
    for point in found:
        plan, more = _plan(point, site_source)
        problems += more
        if plan:
            experiments.append(Experiment(plan, point.source, site_source))
    if problems:
        raise SpecError(*sorted(dict.fromkeys(problems), key=_by_place))
    return experiments


def load_site(path: Path) -> Site:
    """The site profile in a file; SpecError with every problem."""
    source = read_source(path)
    site, problems = validate_partly(Site, source.document, {})
    spec = Spec.model_validate(_PLACEHOLDERS | {"gpus": site.gpus_per_node or 8})
    rules = broken_rules(spec, site, catalogue.models().get(spec.model), catalogue.gpus().get(spec.gpu))
    problems += [p._replace(where=p.where[1:]) for p in rules if p.where[:1] == ("site",)]
    if problems:
        raise SpecError(*sorted(dict.fromkeys(map(source.located, problems)), key=_by_place))
    return site


def _plan(point: Point, site_source: Source) -> tuple[Plan | None, list[Problem]]:
    """The plan of one point, or None; and its problems with file and line. Memory is checked last, if all else is right."""
    source = point.source
    spec, spec_problems = validate_partly(Spec, source.document, _PLACEHOLDERS)
    site, site_problems = validate_partly(Site, site_source.document, {})
    problems = [*spec_problems, *(p._replace(where=("site", *p.where)) for p in site_problems), *point.problems]
    template, template_problems = read_chat_template(source)
    problems += template_problems
    plan = None
    try:
        plan = resolve(
            spec,
            site,
            name=point.name,
            spec_file=source.layers[-1].path.name,
            spec_text=source.text,
            point=source.point,
            overrides={dotted(path): value for path, value in source.overrides.items()},
            user_catalogue=read_user_catalogue(site_source, source),
            chat_template=template,
        )
    except SpecError as error:
        wrong = [problem.where for problem in problems]
        problems += [problem for problem in error.problems if not _reads(problem, wrong)]
    if plan and not problems:
        problems = memory.problems(plan)
    return (None if problems else plan), [_located(problem, source, site_source) for problem in problems]


def _reads(problem: Problem, keys: Sequence[KeyPath]) -> bool:
    """Whether the broken rule reads one of these keys, or a key inside or around one of them."""
    read = (problem.where, *problem.also)
    return any(path[: len(key)] == key or key[: len(path)] == path for path in read for key in keys if key)


def _located(problem: Problem, spec: Source, site: Source) -> Problem:
    """The problem with its file and line. Keys that begin with `site` are in the site profile."""
    if problem.file:
        return problem
    if problem.where[:1] != ("site",):
        return spec.located(problem)
    if site.path is None:
        return problem._replace(file=str(spec.path))
    return site.located(problem._replace(where=problem.where[1:]))


def _by_place(problem: Problem) -> tuple[str, int, str]:
    return (problem.file, problem.line, str(problem))
