"""What is known of a run, key by key: JSON's keys, CSV's header, the flat table's columns, what can be sorted by.

In: `Summary`s or `Group`s and a baseline. Out: rows, key to value. A later ftgen may add keys; none is renamed.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from ftgen.errors import LogError, Problem, closest
from ftgen.results.compare import FORMAT, Baseline
from ftgen.results.repeats import Group, group
from ftgen.results.summary import Summary
from ftgen.results.verdict import STATUSES
from ftgen.units import UNKNOWN, number, percent, ratio, significant, whole

Row = Mapping[str, Any]


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "; ".join(value) or UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    return UNKNOWN if value is None or value == "" else str(value)


class Field(NamedTuple):
    """One key: its JSON type, what it means, what a table calls it and how a table writes it."""

    key: str
    kind: str
    meaning: str
    title: str
    how: Callable[[Any], str] = _text


def _seconds(value: float | None) -> str:
    return significant(value, 4)


WORK = (
    Field("experiment", "string", "the recipe's name, {scheme}_nemo_{model}_{precision}_{gpus}", "Experiment"),
    Field("model", "string?", "a name of the catalogue", "Model"),
    Field("scheme", "string?", "sft or lora", "Scheme"),
    Field("precision", "string?", "bf16, fp8 or fp32", "Precision"),
    Field("gpu", "string?", "a name of the catalogue", "GPU"),
    Field("gpus", "integer?", "how many", "GPUs"),
    Field("global_batch_size", "integer?", "sequences of a step", "GBS"),
    Field("seq_length", "integer?", "tokens of a sequence", "Tokens"),
    Field("options", "strings", "what differs from the recipe's way of doing the work", "Options"),
)
FIGURES = (
    Field("step_time_s", "number?", "seconds a step: the mean of the window", "Step time (s)", _seconds),
    Field("tokens_per_s", "number?", "seq_length x global_batch_size / step_time_s", "Tokens/s", whole),
    Field("mfu", "number?", "model FLOPs utilization, a fraction of the dense peak", "MFU", lambda v: percent(v, 2)),
    Field("days_per_1t_tokens", "number?", "days to train on 10^12 tokens", "Days/1T", lambda v: number(v, 1)),
    Field("peak_memory_gib", "number?", "GiB of the GPU that used most", "Memory (GiB)", lambda v: number(v, 2)),
    Field("published_step_time_s", "number?", "the recipe's, for the same work on H100s", "Published (s)", _seconds),
)
AGAINST = (
    Field("baseline_step_time_s", "number?", "the baseline's, for the same work", "Baseline (s)", _seconds),
    Field("step_time_ratio", "number?", "step_time_s / baseline_step_time_s: above 1 is slower", "Ratio", ratio),
    Field("regressed", "boolean?", "whether the ratio is above 1 + tolerance", "Regressed"),
)
RUN = (
    WORK[0],
    Field("run_id", "string", "Slurm's job id, or what the log's name has in its place", "Run"),
    Field("status", "status", "how the run ended", "Status"),
    Field("reason", "string?", "why that status, or why there is no step time", "Reason"),
    Field("warnings", "strings", "what makes the figures less than certain", "Warnings"),
    Field("notes", "strings", "what a reader should know besides", "Notes"),
    *WORK[1:],
    Field("steps", "integer", "steps the log tells of", "Steps"),
    Field("planned_steps", "integer?", "steps there were to be", "Planned"),
    Field("window", "integer", "steps whose mean is the step time", "Window"),
    Field("window_first", "integer?", "the first of them, numbered from 0", "From"),
    Field("window_last", "integer?", "the last of them", "To"),
    FIGURES[0],
    Field("spread", "number?", "the window's standard deviation, a fraction of the mean", "Spread", lambda v: percent(v, 1)),
    *FIGURES[1:],
    Field("restarts", "integer", "earlier attempts, which do not count", "Restarts"),
    Field("started", "string?", "when, in the cluster's time, ISO 8601", "Started"),
    Field("ended", "string?", "when, in the cluster's time, ISO 8601", "Ended"),
    *AGAINST,
    Field("log", "string", "the log's path, as it was found", "Log"),
)
GROUP = (
    *WORK,
    Field("runs", "integer", "runs there are of this experiment", "Runs"),
    Field("counted", "integer", "of which complete and with a step time", "Counted"),
    FIGURES[0]._replace(meaning="the mean of the counted runs' step times, seconds"),
    Field("step_time_spread_s", "number?", "standard deviation (of a sample) of those, seconds", "Spread (s)", _seconds),
    *FIGURES[1:],
    *AGAINST,
)
# Columns of a flat table unless others are asked for.
SHOWN_OF_RUN = ("experiment", "run_id", "status", "gpu", "global_batch_size", "step_time_s", "spread", "tokens_per_s", "mfu")
SHOWN_OF_GROUP = ("experiment", "gpu", "global_batch_size", "counted", "step_time_s", "step_time_spread_s", "tokens_per_s")


class View(NamedTuple):
    """Which runs are shown, beside what, and how."""

    runs: Sequence[Summary]
    baseline: Baseline | None = None
    flat: bool = False  # a row a run in place of the recipe's tables
    columns: tuple[str, ...] = ()  # keys, of a flat table; empty: what fits
    sort: tuple[str, ...] = ()  # keys, of a flat table; -key from the highest
    group: bool = False  # repeats of an experiment as one

    @property
    def fields(self) -> tuple[Field, ...]:
        """Every key there is."""
        return GROUP if self.group else RUN

    @property
    def is_flat(self) -> bool:
        """Columns and an order are for a flat table."""
        return bool(self.flat or self.columns or self.sort)

    def check(self) -> None:
        """LogError for a column or an order by a key that there is none of."""
        chosen(self.fields, self.columns, "columns")
        chosen(self.fields, [key.removeprefix("-") for key in self.sort], "sort")


def read_keys(text: str) -> tuple[str, ...]:
    """`gpus,-mfu` as its keys."""
    return tuple(filter(None, (key.strip() for key in text.split(","))))


def rows(view: View) -> list[Row]:
    """The runs, or the groups of them, in the order asked for; what is not known comes last."""
    of: Sequence[Summary | Group] = group(view.runs) if view.group else view.runs
    found = [row(each, view.baseline) for each in of]
    for key in reversed(view.sort):
        name, down = key.removeprefix("-"), key.startswith("-")
        known = sorted((each for each in found if each[name] is not None), key=lambda each: each[name], reverse=down)
        found = [*known, *(each for each in found if each[name] is None)]
    return found


def row(of: Summary | Group, baseline: Baseline | None = None) -> Row:
    """Every key of a run or of a group."""
    there = baseline.of(of) if baseline else None
    against = {
        "published_step_time_s": of.published.step_time_s if of.published else None,
        "baseline_step_time_s": there.step_time_s if there else None,
        "step_time_ratio": baseline.ratio(of) if baseline else None,
        "regressed": baseline.regressed(of) if baseline else None,
    }
    fields = GROUP if isinstance(of, Group) else RUN
    return {f.key: _plain(against[f.key] if f.key in against else getattr(of, f.key)) for f in fields}


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, datetime):
        return value.isoformat()
    return list(value) if isinstance(value, tuple) else value


def chosen(fields: Sequence[Field], keys: Sequence[str], option: str) -> tuple[Field, ...]:
    """The fields of these keys; LogError for a key there is none of."""
    by_key = {field.key: field for field in fields}
    wrong = [key for key in keys if key not in by_key]
    if wrong:
        raise LogError(*(Problem((option,), f"unknown key {key}", closest(key, list(by_key))) for key in wrong))
    return tuple(by_key[key] for key in keys)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the results."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Results of ftgen tabulate",
        "description": "Keys may be added; none is renamed, and what one means does not change, while format stays.",
        "type": "object",
        "required": ["format", "baseline", "runs", "groups"],
        "properties": {
            "format": {"const": FORMAT},
            "baseline": _object(
                Field("name", "string", "published, or the name of a file of results", ""),
                Field("tolerance", "number", "how much slower a step may be, as a fraction", ""),
                null=True,
            ),
            "runs": {"type": "array", "items": _object(*RUN)},
            "groups": {"type": "array", "items": _object(*GROUP)},
        },
    }


def _object(*fields: Field, null: bool = False) -> dict[str, Any]:
    return {
        "type": ["object", "null"] if null else "object",
        "required": [field.key for field in fields],
        "properties": {field.key: _type(field.kind) | {"description": field.meaning} for field in fields},
    }


def _type(kind: str) -> dict[str, Any]:
    if kind == "status":
        return {"enum": list(STATUSES)}
    if kind == "strings":
        return {"type": "array", "items": {"type": "string"}}
    return {"type": [kind[:-1], "null"] if kind.endswith("?") else kind}
