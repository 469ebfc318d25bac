"""NeMo's step lines: `Training epoch 0, iteration 7/99 | global_step: 7 | … | train_step_timing in s: 2.693`.

In: one line of bytes, or many. Out: a `StepLine`, or None for a damaged line; of many lines their numbers, losses, times.
"""

import math
import re
from array import array
from typing import NamedTuple

from ftgen.logs.step import LONGEST_STEP_S, SHORTEST_STEP_S, Keys, StepLine, can_be_time, not_finite, number, step_from

WORD = b"train_step_timing in s"
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
# A line as NeMo writes it: its number, loss and time. Lines with a gradient norm are parsed one by one.
SCAN = re.compile(
    rb"\| global_step: (\d{1,9}) \|.*\| reduced_train_loss: (-?[\d.]+(?:e[-+]\d\d)?) "
    rb"\| train_step_timing in s: ([\d.]+(?:e[-+]\d\d)?)(?= \||\n)"
)


class Scanned(NamedTuple):
    """Many lines at once: what every step needs. The rest is parsed when it is asked for."""

    numbers: list[int]
    losses: "array[float]"
    times_s: "array[float]"


def parse(line: bytes) -> StepLine | None:
    """What a step line says; None if it is not as NeMo wrote it."""
    fields = fields_of(line)
    if not can_be_time(fields.get(WORD, b"none")):
        return None
    return step_line(fields)


def step_line(fields: dict[bytes, bytes]) -> StepLine:
    """The step that the fields of a line tell of."""
    number_ = _step_number(fields)
    planned = int(fields[b"last iteration"]) + 1 if b"last iteration" in fields else 0
    step = step_from(
        fields, KEYS, planned=planned if planned > (number_ or 0) else None
    )  # an epoch's steps, after the first
    return StepLine(number_, step, not_finite(fields, (*KEYS["loss"], *KEYS["grad_norm"])))


def scan(text: bytes, count: int) -> Scanned | None:
    """The steps of the `count` step lines in a text; None unless all are plain, with a finite loss and a possible time."""
    found = SCAN.findall(text)
    if len(found) != count:
        return None
    numbers, losses, times = zip(*found, strict=True)
    try:
        scanned = Scanned([*map(int, numbers)], array("d", map(float, losses)), array("d", map(float, times)))
    except ValueError:  # 2.6.9
        return None
    possible = min(scanned.times_s) > SHORTEST_STEP_S and max(scanned.times_s) < LONGEST_STEP_S
    return scanned if possible and max(scanned.losses) < math.inf else None


def is_plain(line: bytes) -> bool:
    """Whether a line can stand for many that were scanned: it is whole, and has no gradient norm that could be infinite."""
    read = parse(line)
    return read is not None and read.step.grad_norm is None and not read.invalid


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
