"""Tables of text. In: a `View`. Out: the recipe's tables or a flat table, and remarks.

The recipe has one table for each model, scheme and precision, with a row for each figure and a column for each run. The
published figures for a size, and then the baseline's, stand after the runs of that size. A flat table has a row for each
run.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from ftgen import catalogue
from ftgen.catalogue import Published
from ftgen.logs.identity import RECIPE_SEQ_LENGTH
from ftgen.results.compare import PUBLISHED, Baseline, Figures, contradicts_itself, ratios, recomputed
from ftgen.results.keys import SHOWN_OF_GROUP, SHOWN_OF_RUN, Field, Row, View, chosen, rows
from ftgen.results.options import shortly
from ftgen.results.repeats import Group, group, kind, order, size
from ftgen.results.summary import Summary
from ftgen.units import UNKNOWN, number, percent, ratio, significant, whole

SCHEMES = {"sft": "SFT", "lora": "LoRA", "pretrain": "pretraining,"}
RATIO = "ratio to "  # a column whose title begins with this belongs to the column before it
GOOD, BAD, FAINT = "good", "bad", "faint"  # tones, which a format may show as colours


class Cell(NamedTuple):
    """A text and its tone."""

    text: str
    tone: str = ""


class Column(NamedTuple):
    """One figure: its title, the short one, and how it is written."""

    title: str
    short: str
    how: Callable[[Figures], str]


class Table(NamedTuple):
    """A header, and rows as long as the header. The notes stand below."""

    title: str
    header: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


class Remark(NamedTuple):
    """A run with its status, and the reason, warnings and notes that belong to it."""

    run: str
    status: str
    reason: str
    log: str


REMARKS = ("Run", "Status", "Reason", "Log")  # the titles of a remark's parts


def _price(figures: Figures) -> str:
    cost = getattr(figures, "cost_per_million_tokens", None)
    return UNKNOWN if cost is None else f"{significant(cost, 4)} {getattr(figures, 'currency', '')}"


COLUMNS = (
    Column(
        "Training step time (seconds per step)", "Step time (s)", lambda s: significant(s.step_time_s, 4)
    ),  # as many digits as NeMo prints
    Column("Throughput in tokens per second", "Tokens/s", lambda s: whole(s.tokens_per_s)),
    Column("Model flops utilization", "MFU", lambda s: percent(s.mfu, 2)),
    Column("Time to train 1T tokens in days", "Days for 1T tokens", lambda s: number(s.days_per_1t_tokens, 1)),
)
# Figures that only runs with telemetry or a price have, by their key.
MEASURED = {
    "joules_per_token": Column(
        "Energy in joules per token", "J/token", lambda s: significant(getattr(s, "joules_per_token", None), 3)
    ),
    "gpu_power_w": Column("Average power of a GPU in watts", "W/GPU", lambda s: number(getattr(s, "gpu_power_w", None), 0)),
    "cost_per_million_tokens": Column("Cost of a million tokens", "Cost of 1M tokens", _price),
}


def columns_of(runs: Sequence[Summary]) -> tuple[Column, ...]:
    """The recipe's figures, and those that one of the runs has in addition."""
    return (*COLUMNS, *(column for key, column in MEASURED.items() if any(getattr(run, key) is not None for run in runs)))


def tabulate(view: View) -> list[Table]:
    """The tables of a view. The recipe's tables show the runs with a step time, ordered by GPUs, then by run."""
    if view.is_flat:
        return [_flat(view)]
    shown = sorted((run for run in view.runs if run.step_time_s is not None), key=order)
    return [_table(list(runs), view) for _, runs in groupby(shown, kind)]


def remarks(runs: Sequence[Summary]) -> list[Remark]:
    """A remark for each run with a reason, warnings or notes, in the tables' order. Each run without figures has one."""
    told = [(s, "; ".join(filter(None, (s.reason, *s.warnings, *s.notes)))) for s in sorted(runs, key=order)]
    return [Remark(f"{s.experiment} {s.run_id}".strip(), s.status, text, s.log) for s, text in told if text]


def _flat(view: View) -> Table:
    shown = SHOWN_OF_GROUP if view.group else SHOWN_OF_RUN
    if view.baseline:
        shown = (*shown, "baseline_step_time_s", "step_time_ratio", "regressed")
    fields = chosen(view.fields, view.columns or shown, "columns")
    lines = [tuple(_flat_cell(field, row) for field in fields) for row in rows(view)]
    return Table("Experiments" if view.group else "Runs", tuple(Cell(field.title) for field in fields), tuple(lines))


def _flat_cell(field: Field, row: Row) -> Cell:
    bad = (field.key == "status" and row["status"] != "complete") or (field.key == "step_time_ratio" and row["regressed"])
    return Cell(field.how(row[field.key]), BAD if bad else "")


def _table(runs: Sequence[Summary], view: View) -> Table:
    """The runs of each size, and after them the published figures and the baseline's for that size."""
    title = experiment_title(runs[0])
    figures = COLUMNS if view.group else columns_of(runs)
    header, columns, notes = [Cell(title)], [[Cell(figure.title) for figure in figures]], []
    for _, same in groupby(runs, size):
        repeats = list(same)
        for top, cells in _size_columns(repeats, view, figures):
            header.append(top)
            columns.append(cells + [Cell(UNKNOWN, FAINT)] * (len(figures) - len(cells)))
        published = repeats[0].published
        if published and contradicts_itself(published):
            notes.append(_contradiction(published))
        if published is None and view.baseline and (source := view.baseline.source(repeats[0])):
            notes.append(f"{view.baseline.name}: {source}")
    return Table(title, tuple(header), tuple(zip(*columns, strict=True)), tuple(notes))


def _size_columns(repeats: Sequence[Summary], view: View, figures: Sequence[Column]) -> Iterator[tuple[Cell, list[Cell]]]:
    """The columns of one size: each run or group with its ratio to the baseline, the published figures, the baseline's."""
    columns: Sequence[Summary | Group] = repeats
    if view.group:
        columns = [each for each in group(repeats) if each.step_time_s] or repeats
    for run in columns:
        yield Cell(_column_title(run, columns)), _cells(run, figures)
        if view.baseline and (there := view.baseline.of(run)):
            yield _ratio_column(run, there, view.baseline)
    baseline = view.baseline.of(columns[0]) if view.baseline else None
    if published := repeats[0].published:
        yield from _published_columns(published, both=view.baseline is not None and view.baseline.name == PUBLISHED)
    if view.baseline and baseline and view.baseline.name != PUBLISHED:
        yield Cell(view.baseline.name, FAINT), [Cell(text, FAINT) for text in _texts(baseline)]


def _cells(run: Summary | Group, figures: Sequence[Column]) -> list[Cell]:
    cells = [Cell(figure.how(run)) for figure in figures]
    if isinstance(run, Group) and run.step_time_spread_s is not None:
        cells[0] = Cell(f"{cells[0].text} ± {significant(run.step_time_spread_s, 2)}")
    return cells


def _texts(figures: Figures) -> list[str]:
    return [column.how(figures) for column in COLUMNS]


def _ratio_column(run: Summary | Group, there: Figures, baseline: Baseline) -> tuple[Cell, list[Cell]]:
    """The ratio of each figure to the baseline's. The title says in words what the colour shows."""
    regressed = baseline.regressed(run)
    faster = (baseline.ratio(run) or 1.0) <= 1.0
    tone = BAD if regressed else GOOD if faster else ""
    top = f"{RATIO}{baseline.name}" + (": regressed" if regressed else "")
    return Cell(top, tone), [Cell(ratio(value), tone) for value in ratios(run, there)]


def _published_columns(row: Published, *, both: bool) -> Iterator[tuple[Cell, list[Cell]]]:
    """The figures as published, marked if they contradict the step time; and those that follow from the step time."""
    cells = [Cell(text, FAINT) for text in _texts(row)]
    if contradicts_itself(row):
        cells[1] = Cell(f"{cells[1].text} *", FAINT)
    top = f"published, {row.gpus}x {row.gpu.upper()}"
    yield Cell(top, FAINT), cells
    if both:
        yield Cell(f"{top}, from its step time", FAINT), [Cell(text, FAINT) for text in _texts(recomputed(row))]


def _contradiction(row: Published) -> str:
    gives = whole(recomputed(row).tokens_per_s)
    return f"* as published for {row.gpus} GPUs; its step time of {significant(row.step_time_s, 4)} s gives {gives}"


def experiment_title(run: Summary | Group) -> str:
    """Llama-3 8B finetuning, LoRA FP8; the experiment's name if model, scheme or precision is unknown."""
    model, how = model_and_training(run)
    if not how:
        return run.experiment
    return f"{model} {how}" if run.scheme == "pretrain" else f"{model} finetuning, {how}"


def model_and_training(run: Summary | Group) -> tuple[str, str]:
    """Llama-3 8B, and LoRA FP8; two empty texts if model, scheme or precision is unknown."""
    if not (run.model and run.scheme and run.precision):
        return "", ""
    model = catalogue.models().get(run.model)
    title = model.title.partition(",")[0] if model else run.model
    return title, f"{SCHEMES.get(run.scheme, run.scheme)} {run.precision.upper()}"


def _column_title(run: Summary | Group, beside: Sequence[Summary | Group]) -> str:
    """8x H100 GPUs (GBS=32), as in the recipe, and what distinguishes the run from its neighbours."""
    length = "" if run.seq_length == RECIPE_SEQ_LENGTH else f", {run.seq_length or UNKNOWN} tokens"
    title = f"{accelerators(run)} (GBS={run.global_batch_size or UNKNOWN}{length})"
    title = ", ".join(filter(None, (title, shortly(run.options))))
    if isinstance(run, Group):
        counted = str(run.counted) if run.counted == run.runs else f"{run.counted} of {run.runs} runs"
        return title if run.runs == 1 else f"{title}, mean of {counted}"
    title += f", run {run.run_id}" if len(beside) > 1 else ""
    return title if run.status == "complete" else f"{title}, {run.status}"


def accelerators(run: Summary | Group) -> str:
    """8x H100 GPUs; 1x CPU."""
    gpus = UNKNOWN if run.gpus is None else run.gpus
    gpu = "CPU" if run.gpu == "cpu" else f"{(run.gpu or UNKNOWN).upper()} GPU{'' if run.gpus == 1 else 's'}"
    return f"{gpus}x {gpu}"
