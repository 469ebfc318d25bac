"""Tables with a row for each run. In: works and a baseline. Out: a `Table` for each model, scheme and precision.

The figures are those of the recipe's tables. Below the runs of a work stands what was published for it, and the baseline's.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from ftgen.results.compare import PUBLISHED, Baseline, Figures, contradicts_itself, recomputed
from ftgen.results.keys import View
from ftgen.results.repeats import kind
from ftgen.show.chart_parts import grouped
from ftgen.show.tables import BAD, FAINT, GOOD, Cell, Column, Table, columns_of, experiment_title, tabulate
from ftgen.show.works import NamedRun, Work, on_gpus
from ftgen.units import UNKNOWN, ratio

Row = tuple[Cell, ...]


def run_tables(works: Sequence[Work], view: View) -> list[Table]:
    """Every run with a step time, in the order of the works."""
    notes = {table.title: table.notes for table in tabulate(View(view.runs))}
    tables = []
    for _, same in groupby(works, lambda work: kind(work.runs[0].run)):
        of_kind = list(same)
        title = experiment_title(of_kind[0].runs[0].run)
        figures = columns_of([each.run for work in of_kind for each in work.runs])
        rows = tuple(row for work in of_kind for row in _rows(work, view.baseline, figures))
        heads = [
            title,
            *(figure.short for figure in figures),
            *([f"Ratio of step times to {view.baseline.name}"] if view.baseline else []),
        ]
        if rows:
            tables.append(Table(title, tuple(map(Cell, heads)), rows, notes.get(title, ())))
    return tables


def _rows(work: Work, baseline: Baseline | None, figures: Sequence[Column]) -> Iterator[Row]:
    timed = [each for each in work.runs if each.run.step_time_s is not None]
    for each in timed:
        yield (Cell(_name(each)), *_figures(each.run, figures), *([_ratio(each, baseline)] if baseline else []))
    if not timed:
        return
    blank = (Cell(UNKNOWN, FAINT),) if baseline else ()
    if row := timed[0].run.published:
        top = f"published, {row.gpus}x {row.gpu.upper()}"
        cells = _figures(row, figures, FAINT)
        if contradicts_itself(row):
            cells[1] = Cell(f"{cells[1].text} *", FAINT)
        yield (Cell(top, FAINT), *cells, *blank)
        if baseline and baseline.name == PUBLISHED:
            yield (Cell(f"{top}, from its step time", FAINT), *_figures(recomputed(row), figures, FAINT), *blank)
    there = baseline.of(timed[0].run) if baseline else None
    if baseline and there and baseline.name != PUBLISHED:
        yield (Cell(baseline.name, FAINT), *_figures(there, figures, FAINT), *blank)


def _name(each: NamedRun) -> str:
    name = f"{on_gpus(each.run)}: {each.name}"
    return name if each.run.status == "complete" else f"{name}, {each.run.status}"


def _figures(of: Figures, figures: Sequence[Column], tone: str = "") -> list[Cell]:
    return [Cell(grouped(column.how(of)), tone) for column in figures]


def _ratio(each: NamedRun, baseline: Baseline) -> Cell:
    """The words say what the colour does."""
    value, regressed = baseline.ratio(each.run), baseline.regressed(each.run)
    tone = BAD if regressed else GOOD if value and value <= 1 else ""
    return Cell(ratio(value) + (": regressed" if regressed else ""), tone)
