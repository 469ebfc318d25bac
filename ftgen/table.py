"""Summaries to tables of text. In: `Summary`s. Out: a table for each model, scheme and precision, and remarks.

A table has a row for each figure and a column for each run, and beside the runs of a size what was published for it.
"""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

from ftgen import catalogue
from ftgen.identity import RECIPE_SEQ_LENGTH
from ftgen.summarize import Summary

UNKNOWN = "–"
SCHEMES = {"sft": "SFT", "lora": "LoRA"}


class Figures(Protocol):
    """What the recipe's tables show: of a run, or as published."""

    @property
    def step_time_s(self) -> float | None: ...  # noqa: D102

    @property
    def tokens_per_s(self) -> float | None: ...  # noqa: D102

    @property
    def mfu(self) -> float | None: ...  # noqa: D102

    @property
    def days_per_1t_tokens(self) -> float | None: ...  # noqa: D102


class Column(NamedTuple):
    """One figure: what it is called and how it is written."""

    title: str
    how: Callable[[Figures], str]


class Table(NamedTuple):
    """Text in cells; every row as long as the header."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Remark(NamedTuple):
    """What must be said of a run beside its figures, or in place of them."""

    run: str
    status: str
    reason: str
    log: str


def number(value: float | None, decimals: int) -> str:
    """Rounded, without zeros at the end: 1.32, 0.924, 116."""
    if value is None:
        return UNKNOWN
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def significant(value: float | None, digits: int) -> str:
    """Rounded to so many digits, or to whole numbers if those are more."""
    if not value:
        return UNKNOWN
    return number(value, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


def whole(value: float | None) -> str:
    """Cut to a whole number, as the recipe does."""
    return UNKNOWN if value is None else str(math.floor(round(value, 6)))


def percent(value: float | None, decimals: int) -> str:
    """A fraction as a percentage."""
    return UNKNOWN if value is None else f"{number(100 * value, decimals)}%"


COLUMNS = (
    Column("Training step time (seconds per step)", lambda s: significant(s.step_time_s, 4)),  # as many as NeMo prints
    Column("Throughput in tokens per second", lambda s: whole(s.tokens_per_s)),
    Column("Model flops utilization", lambda s: percent(s.mfu, 2)),
    Column("Time to train 1T tokens in days", lambda s: number(s.days_per_1t_tokens, 1)),
)


def tabulate(summaries: Sequence[Summary]) -> list[Table]:
    """The recipe's tables of every run that has a step time: columns by GPUs, then by run."""
    shown = sorted((summary for summary in summaries if summary.step_time_s is not None), key=_order)
    return [_table(_title(group[0]), group) for _, group in _grouped(shown, _kind)]


def remarks(summaries: Sequence[Summary]) -> list[Remark]:
    """Every run of which something must be said, in the tables' order: all that have no figures are among them."""
    told = [(s, "; ".join(filter(None, (s.reason, *s.doubts, *s.notes)))) for s in sorted(summaries, key=_order)]
    return [Remark(f"{s.experiment} {s.run_id}".strip(), s.status, text, s.log) for s, text in told if text]


def _table(title: str, runs: Sequence[Summary]) -> Table:
    """Columns of the same size share what was published for that size, after the last of them."""
    header, columns = [title], [[column.title for column in COLUMNS]]
    for _, repeats in _grouped(runs, _size):
        for run in repeats:
            header.append(_column_title(run, repeats))
            columns.append([column.how(run) for column in COLUMNS])
        if published := repeats[0].published:
            header.append(f"published, {published.gpus}x {published.gpu.upper()}")
            columns.append([column.how(published) for column in COLUMNS])
    return Table(title, tuple(header), tuple(zip(*columns, strict=True)))


def _title(run: Summary) -> str:
    """Llama-3 8B finetuning, LoRA FP8; the experiment's name where that is not known."""
    if not (run.model and run.scheme and run.precision):
        return run.experiment
    model = catalogue.models().get(run.model)
    title = model.title.partition(",")[0] if model else run.model
    return f"{title} finetuning, {SCHEMES.get(run.scheme, run.scheme)} {run.precision.upper()}"


def _column_title(run: Summary, repeats: Sequence[Summary]) -> str:
    """8x H100 GPUs (GBS=32), as in the recipe, with what else tells the run from its neighbours."""
    gpus = UNKNOWN if run.gpus is None else run.gpus
    gpu = "CPU" if run.gpu == "cpu" else f"{(run.gpu or UNKNOWN).upper()} GPU{'' if run.gpus == 1 else 's'}"
    length = "" if run.seq_length == RECIPE_SEQ_LENGTH else f", {run.seq_length or UNKNOWN} tokens"
    title = f"{gpus}x {gpu} (GBS={run.global_batch_size or UNKNOWN}{length})"
    title += f", run {run.run_id}" if len(repeats) > 1 else ""
    return title if run.status == "complete" else f"{title}, {run.status}"


def _kind(run: Summary) -> tuple[str, ...]:
    """What shares a table; a run that is not known for anything has one of its own."""
    kind = tuple(str(part or "") for part in (run.model, run.scheme, run.precision))
    return kind if all(kind) else (*kind, run.experiment)


def _size(run: Summary) -> tuple[int | str, ...]:
    return (run.gpus or 0, run.global_batch_size or 0, run.seq_length or 0, run.gpu or "")


def _order(run: Summary) -> tuple[object, ...]:
    """The recipe's order: SFT before LoRA, BF16 before FP8; then sizes, then ids as numbers."""
    known = (run.model or "~", -ord((run.scheme or "~")[0]), run.precision or "~")
    return (*known, _kind(run), _size(run), len(run.run_id), run.run_id, run.log)


def _grouped(
    runs: Sequence[Summary], key: Callable[[Summary], tuple[object, ...]]
) -> list[tuple[tuple[object, ...], list[Summary]]]:
    return [(value, list(group)) for value, group in groupby(runs, key)]
