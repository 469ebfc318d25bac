"""One step of training, as a log tells it. In: the fields of a step line, as text. Out: a `StepLine`.

Steps are counted from 0, and seconds are seconds, whatever the framework that wrote the log counts in.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from math import isfinite
from typing import NamedTuple

DIGITS = re.compile(rb"[-+.eE\d ]*")
LONGEST_STEP_S, SHORTEST_STEP_S = 1e6, 1e-6  # no step is longer or shorter
LARGEST = 1e30  # no measurement is larger


class Step(NamedTuple):
    """What the step lines of one step said. None: not said, or not a number."""

    time_s: float | None  # of the slowest rank that said so
    loss: float | None
    grad_norm: float | None = None
    peak_memory: float | None = None  # bytes
    tflops_per_gpu: float | None = None  # TFLOP/s, as the framework counts them
    global_batch_size: int | None = None
    consumed_samples: float | None = None  # until the end of the step
    planned: int | None = None  # steps of the whole run
    fastest_s: float | None = None  # of the fastest rank, where several said so


class StepLine(NamedTuple):
    """One step line."""

    number: int | None  # from 0; None where the line does not say it
    step: Step
    invalid: str | None = None  # why nothing was learned in this step: a loss that is not a number, a skipped step
    bar: bool = False  # a progress bar, which rounds
    counter: int | None = None  # the bar's own: with gradient accumulation several bars tell of one step
    skipped: bool = False  # fp16 skipped it while its loss scale settled
    left_out: bool = False  # the line has no loss, as Megatron writes it for NaN


class StepTime(NamedTuple):
    """Megatron-Bridge's other line of a step. It comes from another rank and does not name its step."""

    time_s: float
    tflops_per_gpu: float


Fields = Mapping[bytes, bytes]
Keys = Mapping[str, tuple[bytes, ...]]  # a format's keys for the fields of `Step`, in the order of preference


def step_line(
    number_: int | None, fields: Fields, keys: Keys, planned: int | None, second: float = 1.0, others: Sequence[bytes] = ()
) -> StepLine:
    """The step that the fields of a line tell of.

    `second` is how many of the line's units of time make one second; `others` are keys of losses that are not the step's.
    """
    numbers = {key: number(fields[key]) for key in (*chain(*keys.values()), *others) if key in fields}
    said = {name: _first(numbers, several) for name, several in keys.items()}
    time_s, size = said["time_s"], said["global_batch_size"]
    step = Step(
        time_s=within(time_s and time_s / second, SHORTEST_STEP_S, LONGEST_STEP_S),
        loss=said["loss"],
        grad_norm=said["grad_norm"],
        peak_memory=within(said.get("peak_memory"), 0, LARGEST),  # without a GPU it is 0
        tflops_per_gpu=said["tflops_per_gpu"],
        global_batch_size=int(size) if size is not None and 1 <= size < 1e9 else None,
        consumed_samples=said["consumed_samples"],
        planned=planned or None,
    )
    judged = (*keys["loss"], *keys["grad_norm"], *others)
    invalid = [f"{key.decode()} is {numbers[key]}" for key in judged if not isfinite(numbers.get(key) or 0)]
    return StepLine(number_, step, invalid[0] if invalid else None)


def number(text: bytes | None) -> float | None:
    """The number that the text is; of `now/average` the first; None for any other text."""
    if not text or b"_" in text:  # Python reads 1_0 as 10
        return None
    try:
        return float(text.partition(b"/")[0])
    except ValueError:
        return None


def is_time(text: bytes | None) -> bool:
    """Whether this is a number, or at least made of its characters (2.6.9); a step with such a time counts, without it."""
    return number(text) is not None or (text is not None and bool(DIGITS.fullmatch(text)))


def within(value: float | None, least: float, most: float) -> float | None:
    """The value, if it is between these."""
    return value if value is not None and least < value < most else None


def _first(numbers: Mapping[bytes, float | None], keys: tuple[bytes, ...]) -> float | None:
    """The number under the first key that does not say 0."""
    value = None
    for key in keys:
        if key in numbers and (value := numbers[key]) != 0:
            break
    return value
