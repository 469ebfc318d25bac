"""A report of runs: one HTML file that opens offline. In: runs with their logs. Out: the page.

The charts are drawn here, as SVG; the page's one script moves between their points and is the only one that the page's own
security policy lets a browser run.
"""

import base64
import json
import pickle
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import groupby
from typing import Any, NamedTuple

from markupsafe import Markup

from ftgen import __version__
from ftgen.logs.find import Run
from ftgen.logs.log import Log
from ftgen.logs.many import Progress, read_all
from ftgen.results.keys import RUN, View, row
from ftgen.results.repeats import group, kind, order, way
from ftgen.results.summary import Summary, judge
from ftgen.results.variants import STOCK, variant
from ftgen.results.verdict import STATUSES
from ftgen.results.window import Window, checked
from ftgen.show import charts, group_charts
from ftgen.show.chart_parts import MOST_RUNS, Chart, grouped
from ftgen.show.curves import Curves, curves
from ftgen.show.pages import pieces, source
from ftgen.show.run_tables import run_tables
from ftgen.show.svg import svg
from ftgen.show.works import NamedRun, Work, works

SCRIPT = "report.js"
MOST_NAMED = 6  # runs that are not complete, named on the first screen for each work
TOLD = {"experiment", "run_id", "status", "reason", "warnings", "notes", "log"}  # keys that stand elsewhere on the page


class Told(NamedTuple):
    """What is shown of a run besides its summary."""

    curves: Curves
    told_by: list[tuple[str, str]]  # the lines of the log that the verdict stands on
    plan: list[tuple[str, str]]
    environment: list[tuple[str, str]]


class Reading(NamedTuple):
    """A run, and what its log says, in as little memory as it takes: there may be thousands of them."""

    run: Summary
    variant: str  # of the run's plan
    losses: int  # steps of which the loss is known
    packed: bytes

    @classmethod
    def of(cls, run: Summary, log: Log) -> "Reading":
        """All that is shown of a run."""
        drawn = curves(log.steps, log.history.validations)
        told_by = [(kind, told.note) for kind, told in log.at_end.items() if not told.json]
        told = Told(drawn, told_by, flattened(log.plan or {}), flattened(log.environment or {}))
        return cls(run, variant(log.plan, log.environment), drawn.losses.known, zlib.compress(pickle.dumps(told), 1))

    @property
    def told(self) -> Told:
        """Unpacked, each time that it is asked for."""
        told: Told = pickle.loads(zlib.decompress(self.packed))  # noqa: S301, from `of`
        return told


class Figure(NamedTuple):
    """A chart, drawn."""

    title: str
    sentence: str
    svg: Markup


class Section(NamedTuple):
    """What the page says of one run."""

    anchor: str
    title: str
    run: Summary
    figures: list[Figure]
    facts: list[tuple[str, str]]
    told: Told


ByWork = Sequence[tuple[Work, Sequence[Reading]]]  # each work with its runs, in the order of their names


def read(
    runs: Iterable[Run],
    window: Window | None = None,
    progress: Progress = lambda _: None,
    processes: int | None = None,
) -> list[Reading]:
    """Every run, with what its log says; several are read at once, as `read_all` has it."""
    if window is not None:
        checked(window)
    return read_all(runs, partial(_reading, window=window), progress=progress, processes=processes)


def _reading(run: Run, log: Log, *, window: Window | None) -> Reading:
    return Reading.of(judge(run, log, window=window), log)


def report(readings: Sequence[Reading], view: View, *, title: str) -> Iterator[str]:
    """The page, in pieces; a run is drawn when its piece is asked for."""
    readings = sorted(readings, key=lambda reading: order(reading.run))
    found = works([reading.run for reading in readings], [reading.variant for reading in readings])
    by_work = [(work, readings[int(work.runs[0].anchor[4:]) - 1 :][: len(work.runs)]) for work in found]
    view = view._replace(runs=[reading.run for reading in readings])
    script = source(SCRIPT)
    return pieces(
        "report.html.j2",
        title=title,
        version=__version__,
        counts=_counts(view.runs),
        works=found,
        models=[(model, list(same)) for model, same in groupby(found, lambda work: work.model)],
        most=MOST_NAMED,
        baseline=view.baseline,
        tables=run_tables(found, view),
        overview=list(_overview(by_work, readings)),
        sections=(
            _section(named, work, reading, view)
            for work, same in by_work
            for named, reading in zip(work.runs, same, strict=True)
        ),
        grouped=grouped,
        script=Markup(script),  # noqa: S704, our own file
        script_hash=base64.b64encode(sha256(script.encode()).digest()).decode(),
    )


def _counts(runs: Sequence[Summary]) -> list[tuple[str, int]]:
    counted = Counter(run.status for run in runs)
    return [(status, counted[status]) for status in STATUSES if counted[status]]


def _overview(by_work: ByWork, readings: Sequence[Reading]) -> Iterator[tuple[str, Iterable[Figure]]]:
    """Charts of all runs: what stands above those of single runs."""
    variants = {way(reading.run): reading.variant for reading in reversed(readings)}
    kinds = [list(same) for _, same in groupby(group([reading.run for reading in readings]), kind)]
    scaling = group_charts.scaling([each for groups in kinds for each in groups], variants)
    known = {
        "Throughput": [chart for groups in kinds if (chart := group_charts.throughput(groups, variants))],
        "Scaling": [scaling] if scaling else [],
        "Memory": [chart for groups in kinds if (chart := group_charts.memory(groups, variants))],
    }
    yield from ((name, map(_figure, found)) for name, found in known.items() if found)
    if any(sum(reading.losses > 1 for reading in same) > 1 for _, same in by_work):
        yield "Losses", (_figure(chart) for work, same in by_work for chart in _losses(work, same))


def _losses(work: Work, readings: Sequence[Reading]) -> Iterator[Chart]:
    """The losses of a work's runs, as many at a time as fit a chart, and their differences from the first stock run."""
    known = [(named, reading) for named, reading in zip(work.runs, readings, strict=True) if reading.losses > 1]
    if len(known) < 2:
        return
    first, reading = next((each for each in known if each[0].variant.endswith(STOCK)), known[0])
    reference = (first.name, reading.told.curves.losses)
    for start in range(0, len(known), MOST_RUNS):
        runs = [(named.name, reading.told.curves.losses) for named, reading in known[start : start + MOST_RUNS]]
        yield charts.losses_together(work.full_title, runs)
        if difference := charts.loss_differences(work.full_title, reference, runs):
            yield difference


def _figure(chart: Chart) -> Figure:
    return Figure(chart.title, chart.sentence, svg(chart))


def _section(named: NamedRun, work: Work, reading: Reading, view: View) -> Section:
    run, told = named.run, reading.told
    values = row(run, view.baseline)
    drawn = told.curves
    found = (charts.step_times(run, drawn.times), charts.losses(drawn.losses), charts.validation(drawn.validation))
    facts = [(f.title, grouped(f.how(values[f.key]))) for f in RUN if f.key not in TOLD and values[f.key] is not None]
    title = f"{work.full_title}: {named.name}"
    return Section(named.anchor, title, run, [_figure(chart) for chart in found if chart], facts, told)


def flattened(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested keys as dotted ones, values as JSON writes them but for texts."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            rows += flattened(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows
