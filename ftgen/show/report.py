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
from ftgen.logs.find import Folder, Run
from ftgen.logs.log import Log
from ftgen.logs.many import Progress, read_all
from ftgen.results.keys import RUN, View, row
from ftgen.results.options import shortly
from ftgen.results.repeats import group, kind, order
from ftgen.results.summary import Summary, judge
from ftgen.results.verdict import STATUSES
from ftgen.results.window import Window, checked
from ftgen.show import charts
from ftgen.show.chart_parts import MOST_RUNS
from ftgen.show.charts import Chart
from ftgen.show.curves import Curve, Curves, curves
from ftgen.show.pages import pieces, source
from ftgen.show.svg import svg
from ftgen.show.tables import experiment_title, tabulate

SCRIPT = "report.js"
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
    losses: int  # steps of which the loss is known
    packed: bytes

    @classmethod
    def of(cls, run: Summary, log: Log) -> "Reading":
        """All that is shown of a run."""
        drawn = curves(log.steps)
        told_by = [(kind, ending.note) for kind, ending in log.endings.items() if not ending.json]
        told = Told(drawn, told_by, flattened(log.plan or {}), flattened(log.environment or {}))
        return cls(run, drawn.losses.known, zlib.compress(pickle.dumps(told), 1))

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


class Line(NamedTuple):
    """A run in the list of all."""

    anchor: str
    title: str
    run: Summary

    @property
    def words(self) -> str:
        """What must be said of the run, in one line."""
        return "; ".join(filter(None, (self.run.reason, *self.run.warnings)))


def read(
    folders: Iterable[Folder],
    window: Window | None = None,
    progress: Progress = lambda _: None,
    processes: int | None = None,
) -> list[Reading]:
    """Every run in the folders, with what its log says; several are read at once, as `read_all` has it."""
    if window is not None:
        checked(window)
    return read_all(folders, partial(_reading, window=window), progress=progress, processes=processes)


def _reading(run: Run, log: Log, *, window: Window | None) -> Reading:
    return Reading.of(judge(run, log, window=window), log)


def report(readings: Sequence[Reading], view: View, *, title: str) -> Iterator[str]:
    """The page, in pieces; a run is drawn when its piece is asked for."""
    readings = sorted(readings, key=lambda reading: order(reading.run))
    lines = [_line(position, reading.run) for position, reading in enumerate(readings, 1)]
    view = view._replace(runs=[line.run for line in lines])
    script = source(SCRIPT)
    return pieces(
        "report.html.j2",
        title=title,
        version=__version__,
        counts=_counts(view.runs),
        tables=tabulate(view),
        overview=list(_overview(readings)),
        lines=lines,
        sections=(_section(line, reading, view) for line, reading in zip(lines, readings, strict=True)),
        script=Markup(script),  # noqa: S704, our own file
        script_hash=base64.b64encode(sha256(script.encode()).digest()).decode(),
    )


def _counts(runs: Sequence[Summary]) -> list[tuple[str, int]]:
    counted = Counter(run.status for run in runs)
    return [(status, counted[status]) for status in STATUSES if counted[status]]


def _overview(readings: Sequence[Reading]) -> Iterator[tuple[str, Iterable[Figure]]]:
    """Charts of all runs: what stands above those of single runs."""
    kinds = [list(same) for _, same in groupby(group([reading.run for reading in readings]), kind)]
    scaling = charts.scaling([each for groups in kinds for each in groups])
    known = {
        "Throughput": [chart for groups in kinds if (chart := charts.throughput(groups))],
        "Scaling": [scaling] if scaling else [],
        "Memory": [chart for groups in kinds if (chart := charts.memory(groups))],
    }
    yield from ((name, map(_figure, found)) for name, found in known.items() if found)
    alike = (list(same) for _, same in groupby((r for r in readings if r.losses > 1), lambda reading: kind(reading.run)))
    repeated = [runs for runs in alike if len(runs) > 1]
    if repeated:
        yield "Losses", (_figure(charts.losses_together(part)) for runs in repeated for part in _losses(runs))


def _losses(readings: Sequence[Reading]) -> Iterator[list[tuple[Summary, Curve]]]:
    """The runs with their losses, as many at a time as fit a chart."""
    for start in range(0, len(readings), MOST_RUNS):
        yield [(each.run, each.told.curves.losses) for each in readings[start : start + MOST_RUNS]]


def _figure(chart: Chart) -> Figure:
    return Figure(chart.title, chart.sentence, svg(chart))


def _line(position: int, run: Summary) -> Line:
    what = f"{experiment_title(run)} on {run.gpus} {(run.gpu or '').upper()}"
    return Line(f"run-{position}", ", ".join(filter(None, (what, shortly(run.options), f"run {run.run_id}"))), run)


def _section(line: Line, reading: Reading, view: View) -> Section:
    run, told = line.run, reading.told
    values = row(run, view.baseline)
    found = (charts.step_times(run, told.curves.times), charts.losses(told.curves.losses))
    facts = [(f.title, f.how(values[f.key])) for f in RUN if f.key not in TOLD and values[f.key] is not None]
    return Section(line.anchor, line.title, run, [_figure(chart) for chart in found if chart], facts, told)


def flattened(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested keys as dotted ones, values as JSON writes them but for texts."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            rows += flattened(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows
