"""The keys of the results. They are JSON's keys, CSV's header, and the columns and sort keys of the flat table.

In: `Summary`s or `Group`s, and a baseline. Out: rows, key to value. A later ftgen may add keys, but renames none.
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
    """One key: its JSON type, its meaning, its title in a table, and how a table writes its value."""

    key: str
    kind: str
    meaning: str
    title: str
    how: Callable[[Any], str] = _text


def _seconds(value: float | None) -> str:
    return significant(value, 4)


WORK = (
    Field(
        "experiment",
        "string",
        "name of the experiment in the recipe's form {scheme}_{engine}_{model}_{precision}_{gpus}",
        "Experiment",
    ),
    Field("engine", "string?", "what trained: nemo or megatron_bridge", "Engine"),
    Field("model", "string?", "name of the model in the catalogue", "Model"),
    Field("scheme", "string?", "sft, lora or pretrain", "Scheme"),
    Field("precision", "string?", "bf16, fp8 or fp32", "Precision"),
    Field("gpu", "string?", "name of the GPU in the catalogue", "GPU"),
    Field("gpus", "integer?", "number of GPUs", "GPUs"),
    Field("global_batch_size", "integer?", "sequences in a step", "GBS"),
    Field("seq_length", "integer?", "tokens in a sequence", "Tokens"),
    Field(
        "options",
        "strings",
        "how the plan differs from the recipe: parallelism, MBS, engine, packing, LoRA's targets, optimizations",
        "Options",
    ),
)
FIGURES = (
    Field("step_time_s", "number?", "mean time of a step in the window, in seconds", "Step time (s)", _seconds),
    Field("tokens_per_s", "number?", "seq_length x global_batch_size / step_time_s", "Tokens/s", whole),
    Field(
        "mfu", "number?", "model FLOPs utilization, as a fraction of the GPU's dense peak", "MFU", lambda v: percent(v, 2)
    ),
    Field("days_per_1t_tokens", "number?", "days to train on 10^12 tokens at this speed", "Days/1T", lambda v: number(v, 1)),
    Field(
        "peak_memory_gib",
        "number?",
        "highest memory use of any GPU in the window, in GiB",
        "Memory (GiB)",
        lambda v: number(v, 2),
    ),
    Field(
        "published_step_time_s",
        "number?",
        "step time that the recipe published for the same work on H100s, in seconds",
        "Published (s)",
        _seconds,
    ),
)
AGAINST = (
    Field(
        "baseline_step_time_s",
        "number?",
        "step time of the baseline for the same work, in seconds",
        "Baseline (s)",
        _seconds,
    ),
    Field("step_time_ratio", "number?", "step_time_s / baseline_step_time_s: above 1 is slower", "Ratio", ratio),
    Field(
        "regressed",
        "boolean?",
        "whether step_time_ratio is above 1 + tolerance, or beyond the noise of the history's repeats",
        "Regressed",
    ),
)
RUN = (
    WORK[0],
    Field("run_id", "string", "Slurm's job id, or the part of the log's name that stands in its place", "Run"),
    Field("status", "status", "how the run ended", "Status"),
    Field("reason", "string?", "why the run has this status, or why it has no step time", "Reason"),
    Field("warnings", "strings", "reasons to distrust a figure", "Warnings"),
    Field("notes", "strings", "facts that explain the figures but are no reason to distrust them", "Notes"),
    *WORK[1:],
    Field("steps", "integer", "steps that the run made, judged by its log", "Steps"),
    Field("planned_steps", "integer?", "steps that the run should make", "Planned"),
    Field("window", "integer", "number of steps whose mean is the step time", "Window"),
    Field("window_first", "integer?", "first step of the window, numbered from 0", "From"),
    Field("window_last", "integer?", "last step of the window", "To"),
    FIGURES[0],
    Field(
        "spread",
        "number?",
        "standard deviation of the window's step times, as a fraction of their mean",
        "Spread",
        lambda v: percent(v, 1),
    ),
    *FIGURES[1:],
    Field("tflops_per_gpu", "number?", "TFLOP/s of one GPU, from the step time", "TFLOPS", lambda v: number(v, 1)),
    Field(
        "logged_tflops_per_gpu", "number?", "TFLOP/s of one GPU, as the log reports them", "Logged", lambda v: number(v, 1)
    ),
    Field("assumed", "strings", "keys that the experiment's name suggests and the log does not say", "Assumed"),
    Field(
        "tokens_trained",
        "integer?",
        "tokens of all steps until the last one, with padding: steps x global_batch_size x seq_length",
        "Tokens trained",
        whole,
    ),
    Field("validation_loss", "number?", "loss of the last validation", "Validation loss", _seconds),
    Field("validation_step", "integer?", "number of steps before the last validation", "Validated after"),
    Field("restarts", "integer", "earlier attempts of the run", "Restarts"),
    Field("attempts", "strings", "of a run that is saved: what each attempt contributed", "Attempts"),
    Field(
        "total_time_s",
        "number?",
        "time of all attempts of a run that is saved, without the time in the queue, in seconds",
        "Time (s)",
        whole,
    ),
    Field(
        "goodput",
        "number?",
        "time of the steps that count in the end, as a fraction of total_time_s",
        "Goodput",
        lambda v: percent(v, 1),
    ),
    Field("saves", "integer?", "number of checkpoints that the run saved", "Saves"),
    Field("save_time_s", "number?", "time of all saves, in seconds", "Save time (s)", _seconds),
    Field("save_share", "number?", "save_time_s as a fraction of total_time_s", "Save share", lambda v: percent(v, 1)),
    Field(
        "joules_per_token",
        "number?",
        "energy of all GPUs in the window / tokens of the window, in joules",
        "Energy (J/token)",
        lambda v: significant(v, 3),
    ),
    Field("gpu_power_w", "number?", "mean power of a GPU in the window, in watts", "Power (W/GPU)", lambda v: number(v, 0)),
    Field(
        "sm_clock_mhz",
        "number?",
        "mean SM clock of the GPUs in the window, in MHz",
        "SM clock (MHz)",
        lambda v: number(v, 0),
    ),
    Field(
        "throttled",
        "number?",
        "part of the window in which the clocks were held back, as a fraction; a power cap counts",
        "Throttled",
        lambda v: percent(v, 0),
    ),
    Field("throttle_reasons", "strings", "what held the clocks back, with the part of the window", "Throttled by"),
    Field(
        "max_temperature_c",
        "number?",
        "highest temperature of a GPU in the window, in °C",
        "Temperature (°C)",
        lambda v: number(v, 0),
    ),
    Field(
        "energy_kwh",
        "number?",
        "energy of all GPUs and attempts, from the first to the last sample, in kWh",
        "Energy (kWh)",
        lambda v: significant(v, 4),
    ),
    Field(
        "cost",
        "number?",
        "price of the plan's GPUs for total_time_s, or else for the time from the first to the last sample",
        "Cost",
        lambda v: UNKNOWN if v is None else f"{v:.2f}",
    ),
    Field(
        "cost_per_million_tokens",
        "number?",
        "price of the plan's GPUs for a million tokens at this speed",
        "Cost/1M tokens",
        lambda v: significant(v, 4),
    ),
    Field("currency", "string?", "currency of the costs", "Currency"),
    Field("started", "string?", "when the run started, in the cluster's time, ISO 8601", "Started"),
    Field("ended", "string?", "when the run ended, in the cluster's time, ISO 8601", "Ended"),
    *AGAINST,
    Field("log", "string", "path of the log", "Log"),
)
GROUP = (
    *WORK,
    Field("runs", "integer", "number of runs in the group", "Runs"),
    Field("counted", "integer", "number of them that are complete and have a step time", "Counted"),
    FIGURES[0]._replace(meaning="mean step time of the counted runs, in seconds"),
    Field(
        "step_time_spread_s", "number?", "sample standard deviation of their step times, in seconds", "Spread (s)", _seconds
    ),
    *FIGURES[1:],
    *AGAINST,
)
# Columns of a flat table by default.
SHOWN_OF_RUN = ("experiment", "run_id", "status", "gpu", "global_batch_size", "step_time_s", "spread", "tokens_per_s", "mfu")
SHOWN_OF_GROUP = ("experiment", "gpu", "global_batch_size", "counted", "step_time_s", "step_time_spread_s", "tokens_per_s")


class View(NamedTuple):
    """What a format shows: the runs, the baseline, and the kind of table."""

    runs: Sequence[Summary]
    baseline: Baseline | None = None
    flat: bool = False  # one table with a row for each run, in place of the recipe's tables
    columns: tuple[str, ...] = ()  # keys of the flat table's columns; empty for the default ones
    sort: tuple[str, ...] = ()  # keys that order the flat table; `-key` for descending
    group: bool = False  # one row for each group of repeats

    @property
    def fields(self) -> tuple[Field, ...]:
        """All keys of a run, or of a group."""
        return GROUP if self.group else RUN

    @property
    def is_flat(self) -> bool:
        """Whether to show a flat table: asked for, or implied by columns or an order."""
        return bool(self.flat or self.columns or self.sort)

    def check(self) -> None:
        """LogError for an unknown key in `columns` or `sort`."""
        chosen(self.fields, self.columns, "columns")
        chosen(self.fields, [key.removeprefix("-") for key in self.sort], "sort")


def read_keys(text: str) -> tuple[str, ...]:
    """Read `gpus,-mfu`."""
    return tuple(filter(None, (key.strip() for key in text.split(","))))


def rows(view: View) -> list[Row]:
    """The rows of the runs or groups, sorted by `view.sort`. Unknown values come last."""
    of: Sequence[Summary | Group] = group(view.runs) if view.group else view.runs
    found = [row(each, view.baseline) for each in of]
    for key in reversed(view.sort):
        name, down = key.removeprefix("-"), key.startswith("-")
        known = sorted((each for each in found if each[name] is not None), key=lambda each: each[name], reverse=down)
        found = [*known, *(each for each in found if each[name] is None)]
    return found


def row(of: Summary | Group, baseline: Baseline | None = None) -> Row:
    """All keys of a run or a group, with their values."""
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
    """The value as JSON has it."""
    if isinstance(value, datetime):
        return value.isoformat()
    return list(value) if isinstance(value, tuple) else value


def chosen(fields: Sequence[Field], keys: Sequence[str], option: str) -> tuple[Field, ...]:
    """The fields of these keys; LogError for an unknown key."""
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
        "description": "While format stays 1, keys may be added, but no key is renamed and no meaning changes.",
        "type": "object",
        "required": ["format", "baseline", "runs", "groups"],
        "properties": {
            "format": {"const": FORMAT},
            "baseline": _object(
                Field("name", "string", "published, or the name of the file of results", ""),
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
