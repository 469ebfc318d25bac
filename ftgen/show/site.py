"""A site of a history: an index with records beside published figures, and a page for each experiment with its trend.

In: `Record`s, and the sealed runs that belong to them. Out: pages by their names. They need no network and no server.
"""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from itertools import groupby
from typing import Any, NamedTuple

from markupsafe import Markup

from ftgen import __version__, catalogue
from ftgen.catalogue import Publication, Published
from ftgen.results.record import Record, value
from ftgen.results.trend import Series, series
from ftgen.results.variants import UNKNOWN_VARIANT, variant
from ftgen.show.chart_parts import MOST_RUNS, Chart, curve, layered, mark_changes, shortened, thousands
from ftgen.show.history import change_lines
from ftgen.show.pages import page, source
from ftgen.show.svg import svg
from ftgen.units import UNKNOWN, clean, percent, significant

WORK = ("model", "scheme", "precision", "gpu", "gpus", "global_batch_size", "seq_length")  # of an experiment
SCRIPT = "report.js"
LONGEST_TITLE = 30  # characters of a model's title; a longer one explains what its name says
LONGEST_NAME = 120  # characters of a page's name
DERIVED = "~"  # before a published figure that follows from another one
SOFTWARE = ("nemo_toolkit", "megatron-core", "transformer-engine", "torch")

Sealed = Mapping[str, str]  # the file of a sealed run, relative to the site, by the hash of its log


class Line(NamedTuple):
    """A run in a table, as texts."""

    run_id: str
    date: str
    variant: str
    status: str
    step_time: str
    speed: str
    mfu: str
    software: str
    words: str
    sealed: str | None


class Entry(NamedTuple):
    """A row of the records: the best run of an experiment, or what somebody has published."""

    who: str
    page: str | None  # of ours
    work: str
    gpus: str
    batch: str
    length: str
    speed: str
    step_time: str
    date: str
    sealed: str | None
    order: tuple[Any, ...]


class Experiment(NamedTuple):
    """One work on one kind of machine, with all its runs."""

    file: str
    title: str
    gpu: str
    runs: Sequence[Record]
    found: Sequence[Series]

    @property
    def best(self) -> Record | None:
        """The complete run with the shortest step."""
        timed = [run for of in self.found for run in of.runs]
        return min(timed, key=lambda run: run["results"]["step_time_s"], default=None)


def site(records: Sequence[Record], sealed: Sealed, *, title: str) -> dict[str, str]:
    """`index.html`, and a page for each experiment."""
    found = experiments(records)
    common = {"version": __version__, "site": title, **_script()}
    pages = {"index.html": page("site_index.html.j2", title=title, **common, **_index(found, sealed))}
    for each in found:
        pages[each.file] = page("site_experiment.html.j2", title=each.title, **common, **_experiment(each, sealed))
    return pages


def experiments(records: Sequence[Record]) -> list[Experiment]:
    """The experiments by their titles; runs of unknown work belong to that of their name."""
    ordered = sorted(records, key=_kind)  # stable: by time within an experiment
    names: dict[str, int] = {}
    found = []
    for _, same in groupby(ordered, _kind):
        runs = list(same)
        words = [str(value(runs[0], key)) for key in ("experiment", "gpu", "global_batch_size", "seq_length")]
        stem = re.sub("[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")[:LONGEST_NAME]
        names[stem] = names.get(stem, 0) + 1
        file = f"{stem}{'' if names[stem] == 1 else f'-{names[stem]}'}.html"
        gpu = str(value(runs[0], "gpu") or "unknown GPU").upper()
        found.append(Experiment(file, _title(runs[0]), gpu, runs, series(runs)))
    return found


def _kind(of: Record) -> str:
    known = [value(of, key) for key in WORK]
    return str(known if None not in known else [*known, value(of, "experiment")])


def _title(of: Record) -> str:
    if None in [value(of, key) for key in WORK[:5]]:
        return str(value(of, "experiment"))
    gpu = "CPU" if value(of, "gpu") == "cpu" else str(value(of, "gpu")).upper()
    words = [_work(of), f"{value(of, 'gpus')}x {gpu}"]
    sizes = (("GBS ", "global_batch_size", ""), ("", "seq_length", " tokens"))
    words += [f"{before}{value(of, key)}{after}" for before, key, after in sizes if value(of, key)]
    return ", ".join(words)


def _work(of: Record) -> str:
    return _work_of(*(str(value(of, key)) for key in WORK[:3]))


def _work_of(model: str, scheme: str, precision: str) -> str:
    known = catalogue.models().get(model)
    name = known.title if known and len(known.title) <= LONGEST_TITLE else model
    return f"{name} {scheme.upper() if scheme == 'sft' else 'LoRA'} {precision.upper()}"


# The index


def _index(found: Sequence[Experiment], sealed: Sealed) -> dict[str, Any]:
    entries: dict[str, list[Entry]] = {}
    for each in found:
        if each.best:
            entries.setdefault(each.gpu, []).append(_ours(each, each.best, sealed))
    used: dict[str, Publication] = {}
    for gpu, rows in entries.items():
        for publication, result in _published(gpu, {str(row.order[0]) for row in rows}):
            used[publication.name] = publication
            rows.append(_theirs(publication, result))
    hardware = [(gpu, sorted(rows, key=lambda row: row.order)) for gpu, rows in sorted(entries.items())]
    runs = [run for each in found for run in each.runs]
    return {
        "experiments": found,
        "hardware": hardware,
        "sources": [used[name] for name in sorted(used)],
        "counts": _counts(runs),
        "changes": [(each, line) for each in found for of in each.found for line in _changes(of)],
    }


def _ours(each: Experiment, best: Record, sealed: Sealed) -> Entry:
    speed, results = speed_of_gpu(best), best["results"]
    return Entry(
        who=f"{_variant(best)}, run {results['run_id']}",
        page=each.file,
        work=_work(best),
        gpus=str(results["gpus"]),
        batch=str(results["global_batch_size"]),
        length=str(results["seq_length"]),
        speed=thousands(speed),
        step_time=significant(results["step_time_s"], 4),
        date=_date(best),
        sealed=sealed.get(best["log_sha256"]),
        order=(_work(best), -(speed or 0.0)),
    )


def _theirs(publication: Publication, result: Published) -> Entry:
    speed, time_s = result.speed_of_gpu, result.time_of_step_s
    work = _work_of(result.model, result.scheme, result.precision)
    return Entry(
        who=f"{publication.publisher}: {publication.name}",
        page=None,
        work=work,
        gpus=str(result.gpus),
        batch=str(result.global_batch_size),
        length=str(result.seq_length),
        speed=("" if result.tokens_per_s_per_gpu else DERIVED) + thousands(speed),
        step_time=("" if result.step_time_s else DERIVED) + significant(time_s, 4),
        date=publication.date,
        sealed=None,
        order=(work, -(speed or 0.0)),
    )


def _published(gpu: str, works: set[str]) -> Iterable[tuple[Publication, Published]]:
    """What is published of the same model, scheme, precision and GPU, with any number of GPUs."""
    for publication in catalogue.publications():
        for result in publication.results:
            same = result.gpu.upper() == gpu and _work_of(result.model, result.scheme, result.precision) in works
            if same and result.speed_of_gpu:
                yield publication, result


def _counts(runs: Sequence[Record]) -> list[tuple[str, int]]:
    statuses = sorted(str(value(run, "status")) for run in runs)
    return [(status, len(list(same))) for status, same in groupby(statuses)]


# An experiment


def _experiment(each: Experiment, sealed: Sealed) -> dict[str, Any]:
    works = {_work(run) for run in each.runs}
    return {
        "experiment": each,
        "figures": [_figure(chart) for chart in [trend(each)] if chart],
        "changes": [line for of in each.found for line in _changes(of)],
        "lines": [_line(run, sealed) for run in reversed(each.runs)],
        "theirs": [(publication, _theirs(publication, result)) for publication, result in _published(each.gpu, works)],
    }


def trend(each: Experiment) -> Chart | None:
    """The step times of an experiment's complete runs, in the order of time, a curve for each variant."""
    drawn = [of for of in each.found if len(of.runs) > 0][:MOST_RUNS]
    if not drawn:
        return None
    names = _names(drawn)
    order = {id(run): number for number, run in enumerate(each.runs, 1)}
    values = [
        {
            "step": order[id(run)],
            "value": run["results"]["step_time_s"],
            "run": name,
            "label": clean(f"{name}, run {run['results']['run_id']}, {_date(run)}: {significant(time_s, 4)} s"),
        }
        for name, of in zip(names, drawn, strict=True)
        for run, time_s in zip(of.runs, of.times_s, strict=True)
    ]
    changes = [
        {"step": order[id(of.runs[change.at])] - 0.5, "slower": change.ratio > 1} for of in drawn for change in of.changes
    ]
    count = sum(len(of.runs) for of in drawn)
    told = f"{_many(count, 'complete run')} in the order of time, {_many(len(changes), 'change')} of the step time"
    layers = curve(values, "seconds", zero=False, by="run", names=names, across="run", shown=True)
    return Chart("Step time", told, layered([*mark_changes(changes), *layers]))


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _changes(of: Series) -> list[str]:
    """Each change in a sentence, with the versions that changed there."""
    versions = [f"; changed there: {', '.join(change.versions)}" if change.versions else "" for change in of.changes]
    return [line + more for line, more in zip(change_lines(of), versions, strict=True)]


def _names(drawn: Sequence[Series]) -> list[str]:
    """The variants' names, each once."""
    names: list[str] = []
    for of in drawn:
        name = shortened(_variant(of.runs[-1]))
        names.append(name if name not in names else f"{name} ({names.count(name) + 1}: {len(of.work['options'])} options)")
    return names


def _figure(chart: Chart) -> dict[str, Any]:
    return {"title": chart.title, "sentence": chart.sentence, "svg": svg(chart)}


def _line(run: Record, sealed: Sealed) -> Line:
    results, packages = run["results"], value(run, "environment.packages")
    known = packages if isinstance(packages, dict) else {}
    return Line(
        run_id=results["run_id"] or UNKNOWN,
        date=_date(run),
        variant=_variant(run),
        status=str(results["status"]),
        step_time=significant(results["step_time_s"], 4),
        speed=thousands(speed_of_gpu(run)),
        mfu=percent(results["mfu"], 1),
        software=", ".join(f"{name} {known[name]}" for name in SOFTWARE if name in known) or UNKNOWN,
        words="; ".join(filter(None, (results["reason"], *results["warnings"]))),
        sealed=sealed.get(run["log_sha256"]),
    )


def speed_of_gpu(run: Record) -> float | None:
    """Tokens per second and GPU."""
    results = run["results"]
    return results["tokens_per_s"] / results["gpus"] if results["tokens_per_s"] and results["gpus"] else None


def _variant(run: Record) -> str:
    return variant(run["plan"], run["environment"]) or UNKNOWN_VARIANT


def _date(run: Record) -> str:
    return str(run["results"]["started"] or UNKNOWN)[:10]


def _script() -> dict[str, Any]:
    """The only script of a page, and what lets a browser run it."""
    text = source(SCRIPT)
    digest = base64.b64encode(sha256(text.encode()).digest()).decode()
    return {"script": Markup(text), "script_hash": digest}  # noqa: S704, our own file
