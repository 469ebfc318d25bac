"""NeMo's step lines: `Training epoch 0, iteration 7/99 | global_step: 7 | … | train_step_timing in s: 2.693`.

In: one line of bytes, or many. Out: a `StepLine`, or None for a damaged line; of many lines their numbers, losses, times.
"""

import math
import re
from array import array
from typing import NamedTuple

from ftgen.logs.step import (
    LONGEST_STEP_S,
    SHORTEST_STEP_S,
    Keys,
    Step,
    StepLine,
    can_be_time,
    not_finite,
    number,
    step_from,
    within,
)

WORD = b"train_step_timing in s"
UNTIMED = b"| reduced_train_loss: "  # of a line without a time, as NeMo writes it without its timing callback
NUMBER = b"global_step"
ITERATION = re.compile(rb"\biteration +(\d{1,9})/ *(\d{1,9})$")
KEYS: Keys = {
    "time_s": (WORD,),
    "loss": (b"reduced_train_loss",),
    "grad_norm": (b"grad_norm",),
    "tflops_per_gpu": (b"TFLOPS_per_GPU",),
    "global_batch_size": (b"global_batch_size",),
    "consumed_samples": (b"consumed_samples",),
    "peak_memory": (b"peak_memory_usage", b"max_memory_reserved", b"max_memory_allocated"),  # bytes
}
# A line as the recipe's runs have it, by its fields: steps of the epoch, batch, number, memory, loss, time, samples.
# A tenth of the time that fields_of and step_from take for any line; both say the same.
PLAIN = re.compile(
    rb"[^|]*\biteration \d{1,9}/(\d{1,9}) "
    rb"\|(?: lr: [^ |]+ \|)? global_batch_size: ([1-9]\d{0,8}) \| global_step: (\d{1,9}) "
    rb"\|(?: (?:peak_memory_usage|max_memory_reserved): ([1-9]\d{0,17}) \| (?:max_)?memory_allocated: \d+ \|)? "
    rb"reduced_train_loss: (-?\d{1,9}\.\d{1,9}) \| train_step_timing in s: (\d{1,5}\.\d{1,9}) "
    rb"\| consumed_samples: (\d{1,15})\n"
)
# A line as NeMo writes it: its number, loss and time. Lines with a gradient norm are parsed one by one.
SCAN = re.compile(
    rb"\| global_step: (\d{1,9}) \|.*\| reduced_train_loss: ([-+\d.e]+) "
    rb"\| train_step_timing in s: ([-+\d.e]+)(?= \||\n)"
)


class Scanned(NamedTuple):
    """Many lines at once: what every step needs. The rest is parsed when it is asked for."""

    numbers: list[int]
    losses: "array[float]"
    times_s: "array[float]"


def parse(line: bytes) -> StepLine | None:
    """What a step line says; None if it is not as NeMo wrote it."""
    if match := PLAIN.fullmatch(line):
        last, size, number_, memory, loss, time_s, samples = match.groups()
        step = Step(
            time_s=within(float(time_s), SHORTEST_STEP_S, LONGEST_STEP_S),
            loss=float(loss),
            peak_memory=float(memory) if memory else None,
            global_batch_size=int(size),
            consumed_samples=float(samples),
            planned=planned_steps(int(last), int(number_)),
        )
        return StepLine(int(number_), step)
    fields = fields_of(line)
    if not can_be_time(fields.get(WORD, b"none")):
        return None
    return step_line(fields)


def parse_untimed(line: bytes) -> StepLine | None:
    """What a line without a time says; None if it counts no iteration or has no end: its time may come."""
    fields = fields_of(line) if line.endswith(b"\n") else {}
    return step_line(fields) if b"iteration" in fields and NUMBER in fields else None


def step_line(fields: dict[bytes, bytes]) -> StepLine:
    """The step that the fields of a line tell of."""
    number_ = _step_number(fields)
    planned = planned_steps(int(fields.get(b"last iteration", -1)), number_ or 0)
    step = step_from(fields, KEYS, planned=planned)
    return StepLine(number_, step, not_finite(fields, (*KEYS["loss"], *KEYS["grad_norm"])))


def planned_steps(last: int, number_: int) -> int | None:
    """Steps of the run, if this can be the number of its last one: in later epochs it is not."""
    return last + 1 if last + 1 > number_ else None


def scan(text: bytes, start: int, stop: int) -> Scanned | None:
    """The steps of the plain step lines in a part of a text; None if there are none, or a loss or a time is impossible."""
    found = SCAN.findall(text, start, stop)
    if not found:
        return None
    numbers, losses, times = zip(*found, strict=True)
    try:
        scanned = Scanned([*map(int, numbers)], array("d", map(float, losses)), array("d", map(float, times)))
    except ValueError:  # 2.6.9
        return None
    possible = min(scanned.times_s) > SHORTEST_STEP_S and max(scanned.times_s) < LONGEST_STEP_S
    return scanned if possible and math.isfinite(sum(scanned.losses)) else None


def fields_of(line: bytes) -> dict[bytes, bytes]:
    """`key: value | key: value` as a dictionary; empty where two lines have run into each other.

    What stands before the first | is a label and the iteration; a label may have a | of its own.
    """
    parts = line.split(b"|")
    if not line.endswith(b"\n"):
        parts.pop()  # cut off: 2.6 may have been 2.693
    if parts and not parts[-1].strip():
        parts.pop()  # Megatron ends its lines with a |
    while len(parts) > 1 and b":" not in parts[0] and not ITERATION.search(parts[0].rstrip()):
        parts.pop(0)  # `trainer-1  | `
    if not parts:
        return {}
    fields = dict(part.strip().partition(b":")[::2] for part in parts[1:])
    first = parts[0].rstrip()  # with whatever stands before it
    iteration = ITERATION.search(first)
    if iteration:
        fields[b"iteration"], fields[b"last iteration"] = iteration.group(1, 2)
    else:
        label, _, value = first.rpartition(b": ")
        fields[label.rpartition(b": ")[2]] = value
    return fields if len(fields) == len(parts) + bool(iteration) else {}


def _step_number(fields: dict[bytes, bytes]) -> int | None:
    """The step as printed; else the iteration."""
    printed = number(fields.get(NUMBER))
    if printed is not None and 0 <= printed < 1e9 and printed.is_integer():
        return int(printed)
    return int(fields[b"iteration"]) if b"iteration" in fields else None
