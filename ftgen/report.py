"""A report of runs: one HTML file that opens offline. In: runs with their logs. Out: the page.

The charts are drawn here, as SVG; the page's one script moves between their points and is the only one that the page's own
security policy lets a browser run.
"""

import base64
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import groupby
from typing import Any, NamedTuple

from markupsafe import Markup

from ftgen import __version__, charts
from ftgen.charts import Chart
from ftgen.drawing import svg
from ftgen.fields import RUN, View, row
from ftgen.log_lines import Log
from ftgen.outcome import STATUSES
from ftgen.pages import page, source
from ftgen.repeats import group, kind, order
from ftgen.runs import Folder, Run
from ftgen.step_line import Step
from ftgen.summaries import Progress, read_all
from ftgen.summarize import Summary, judge
from ftgen.table import experiment_title, tabulate
from ftgen.units import number, significant
from ftgen.window import Window, checked

SCRIPT = "report.js"
MOST_STEPS = 1000  # rows of a run's table of steps
TOLD = {"experiment", "run_id", "status", "reason", "doubts", "notes", "log"}  # keys that stand elsewhere on the page


class Reading(NamedTuple):
    """A run and what its log says."""

    run: Summary
    log: Log

    @property
    def steps(self) -> Mapping[int, Step]:
        """All of them, in ascending order."""
        return self.log.steps.between(0, self.log.steps.last + 1)


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
    told_by: list[tuple[str, str]]  # the lines of the log that the verdict stands on
    plan: list[tuple[str, str]]
    environment: list[tuple[str, str]]
    steps: list[tuple[str, ...]]

    @property
    def words(self) -> str:
        """What must be said of the run, in one line."""
        return "; ".join(filter(None, (self.run.reason, *self.run.doubts)))


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
    return Reading(judge(run, log, window=window), log)


def report(readings: Sequence[Reading], view: View, *, title: str) -> str:
    """The page."""
    readings = sorted(readings, key=lambda reading: order(reading.run))
    view = view._replace(runs=[reading.run for reading in readings])
    script = source(SCRIPT)
    return page(
        "report.html.j2",
        title=title,
        version=__version__,
        counts=_counts(view.runs),
        tables=tabulate(view),
        overview=[(name, figures) for name, figures in _overview(readings) if figures],
        sections=[_section(position, reading, view) for position, reading in enumerate(readings, 1)],
        script=Markup(script),  # noqa: S704, our own file
        script_hash=base64.b64encode(sha256(script.encode()).digest()).decode(),
    )


def _counts(runs: Sequence[Summary]) -> list[tuple[str, int]]:
    counted = Counter(run.status for run in runs)
    return [(status, counted[status]) for status in STATUSES if counted[status]]


def _overview(readings: Sequence[Reading]) -> Iterator[tuple[str, list[Figure]]]:
    """Charts of all runs: what stands above those of single runs."""
    kinds = [list(same) for _, same in groupby(group([reading.run for reading in readings]), kind)]
    yield "Throughput", _drawn(charts.throughput(groups) for groups in kinds)
    yield "Scaling", _drawn([charts.scaling([each for groups in kinds for each in groups])])
    yield "Memory", _drawn(charts.memory(groups) for groups in kinds)
    same_kind = ([(r.run, r.steps) for r in same] for _, same in groupby(readings, lambda reading: kind(reading.run)))
    yield "Losses", _drawn(chart for some in same_kind for chart in charts.losses_together(some))


def _drawn(found: Any) -> list[Figure]:
    known: list[Chart] = [chart for chart in found if chart]
    return [Figure(chart.title, chart.sentence, svg(chart)) for chart in known]


def _section(position: int, reading: Reading, view: View) -> Section:
    run, log = reading
    steps = reading.steps
    values = row(run, view.baseline)
    return Section(
        anchor=f"run-{position}",
        title=" ".join(
            filter(None, (experiment_title(run), f"on {run.gpus} {(run.gpu or '').upper()}", f"run {run.run_id}"))
        ),
        run=run,
        figures=_drawn([charts.step_times(run, steps), charts.losses(steps)]),
        facts=[(f.title, f.how(values[f.key])) for f in RUN if f.key not in TOLD and values[f.key] is not None],
        told_by=[(kind, ending.note) for kind, ending in log.endings.items() if not ending.json],
        plan=flattened(log.plan or {}),
        environment=flattened(log.environment or {}),
        steps=_steps(steps),
    )


def flattened(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested keys as dotted ones, values as JSON writes them but for texts."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            rows += flattened(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def _steps(steps: Mapping[int, Step]) -> list[tuple[str, ...]]:
    """Every step, for those who would rather read numbers; of very long runs none."""
    if len(steps) > MOST_STEPS:
        return []
    return [
        (
            str(number_),
            significant(step.time_s, 4),
            significant(step.loss, 4),
            significant(step.grad_norm, 4),
            number(step.peak_memory / 2**30 if step.peak_memory else None, 2),
        )
        for number_, step in steps.items()
    ]
