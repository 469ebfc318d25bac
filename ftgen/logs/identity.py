"""What a log is the log of. In: plan.json, a log's head line, or the name of the experiment. Out: an `Identity`.

A plan is read for the keys the tables need and no others: a plan of a later ftgen, with more in it, reads as well.
"""

import json
import re
from functools import lru_cache
from typing import Any, NamedTuple

from ftgen import catalogue
from ftgen.documents import get
from ftgen.errors import LogError, Problem

# What the recipe leaves unsaid in its logs, because it never varies there.
RECIPE_GPU = "h100"
RECIPE_SEQ_LENGTH = 4096

RECIPE_NAME = re.compile(r"(?P<scheme>lora|sft)_nemo_(?P<model>\w+)_(?P<precision>bf16|fp8|fp32)_(?P<gpus>[1-9]\d{0,8})")

MOST = 1e30  # beyond it a number is no measurement of anything, and arithmetic on it overflows


class Identity(NamedTuple):
    """What ran, in the plan's words; None is not known."""

    experiment: str
    model: str | None = None
    scheme: str | None = None
    precision: str | None = None
    gpu: str | None = None
    gpus: int | None = None
    global_batch_size: int | None = None
    seq_length: int | None = None  # tokens
    max_steps: int | None = None
    window_steps: int | None = None
    flops_per_sample: float | None = None
    peak_flops: float | None = None  # FLOP/s of one GPU, dense


# Identity's field: key of the plan, its type, whether it may be null or absent
PLAN_KEYS: dict[str, tuple[tuple[str, ...], type, bool]] = {
    "experiment": (("experiment",), str, False),
    "model": (("model", "name"), str, False),
    "scheme": (("scheme",), str, False),
    "precision": (("precision",), str, False),
    "gpu": (("gpu", "name"), str, False),
    "gpus": (("gpus",), int, False),
    "global_batch_size": (("global_batch_size",), int, False),
    "seq_length": (("seq_length",), int, False),
    "max_steps": (("max_steps",), int, False),
    "window_steps": (("window_steps",), int, True),
    "flops_per_sample": (("model", "flops_per_sample"), float, True),
    "peak_flops": (("gpu", "peak_flops"), float, True),
}
RULES = {str: "must be a text", int: "must be a whole number from 1", float: "must be a number above 0"}


def from_plan(text: str | bytes, file: str) -> tuple[Identity, dict[str, Any]]:
    """The identity in a plan's JSON, and all of it; LogError with everything that is wrong in it."""
    try:
        plan = json.loads(text)
    except json.JSONDecodeError as error:
        raise LogError(Problem((), f"the plan is no JSON: {error.msg}", file=file, line=error.lineno)) from None
    except (ValueError, RecursionError) as error:  # no UTF-8, a number of thousands of digits, nested without end
        raise LogError(Problem((), f"the plan is no JSON: {error}", file=file)) from None
    if not isinstance(plan, dict):
        raise LogError(Problem((), "the plan must be a JSON object", file=file))
    values = {field: get(plan, path) for field, (path, _, _) in PLAN_KEYS.items()}
    problems = [
        Problem(path, f"{RULES[kind]}, found {_short(values[field])}", file=file)
        for field, (path, kind, optional) in PLAN_KEYS.items()
        if not (_fits(values[field], kind) or (optional and values[field] is None))
    ]
    if problems:
        raise LogError(*problems)
    return Identity(**values), plan


@lru_cache
def from_name(experiment: str, global_batch_size: int | None = None) -> Identity:
    """The identity in the recipe's {lora|sft}_nemo_{model}_{precision}_{gpus}; what that leaves out is the recipe's."""
    match = RECIPE_NAME.fullmatch(experiment)
    if not match:
        return Identity(experiment, global_batch_size=global_batch_size)
    model = catalogue.models().get(match["model"])
    return Identity(
        experiment,
        model=match["model"],
        scheme=match["scheme"],
        precision=match["precision"],
        gpu=RECIPE_GPU,
        gpus=int(match["gpus"]),
        global_batch_size=global_batch_size,
        seq_length=RECIPE_SEQ_LENGTH,
        flops_per_sample=model.flops(RECIPE_SEQ_LENGTH) if model else None,
        peak_flops=catalogue.gpus()[RECIPE_GPU].peak_flops(match["precision"]),
    )


def _fits(value: Any, kind: type) -> bool:
    if kind is str:
        return isinstance(value, str) and value != ""
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        return False
    return (1 if kind is int else 1e-30) <= value <= MOST  # NaN is not, either


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
