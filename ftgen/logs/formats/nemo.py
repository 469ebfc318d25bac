"""NeMo's step lines: `Training epoch 0, iteration 7/99 | global_step: 7 | … | train_step_timing in s: 2.693`.

In: one line of bytes, or many. Out: a `StepLine`, or None for a damaged line; of many lines what all of them have.
"""

import math
import re
from array import array
from typing import NamedTuple

from ftgen.logs.step import LONGEST_STEP_S, SHORTEST_STEP_S, Keys, Step, StepLine, is_time, number, step_line, within

WORD = b"train_step_timing in s"
UNTIMED = b"| reduced_train_loss: "  # of a line without a time, as NeMo writes it without its timing callback
NUMBER, GRAD_NORM = b"global_step", b"grad_norm"
ITERATION = re.compile(rb"\biteration +(\d{1,9})/ *(\d{1,9})$")
KEYS: Keys = {
    "time_s": (WORD,),
    "loss": (b"reduced_train_loss",),
    "grad_norm": (GRAD_NORM,),
    "tflops_per_gpu": (b"TFLOPS_per_GPU",),
    "global_batch_size": (b"global_batch_size",),
    "consumed_samples": (b"consumed_samples",),
    "peak_memory": (b"peak_memory_usage", b"max_memory_reserved", b"max_memory_allocated"),  # bytes
}
# A line as the recipe's runs have it: steps of the epoch, batch, number, memory, loss, time, samples. It takes a quarter of
# the time that fields_of and step_line take for any line, and says the same.
PLAIN = re.compile(
    rb"[^|]*\biteration \d{1,9}/(\d{1,9}) "
    rb"\|(?: lr: [^ |]+ \|)? global_batch_size: ([1-9]\d{0,8}) \| global_step: (\d{1,9}) "
    rb"\|(?: (?:peak_memory_usage|max_memory_reserved): ([1-9]\d{0,17}) \| (?:max_)?memory_allocated: \d+ \|)? "
    rb"reduced_train_loss: (-?\d{1,9}\.\d{1,9}) \| train_step_timing in s: (\d{1,5}\.\d{1,9}) "
    rb"\| consumed_samples: (\d{1,15})\n"
)
# Number, loss and time of a line.
ALIKE_NUMBER = b"| global_step: "
ALIKE = re.compile(
    rb"\| global_step: (\d{1,9}) \|.*\| reduced_train_loss: ([-+\d.e]+) \| train_step_timing in s: ([-+\d.e]+)(?: \|.*)?\n"
)


class Alike(NamedTuple):
    """Step lines that are read at once: what every step needs, and the text, which has the rest."""

    numbers: list[int]
    losses: "array[float]"
    times_s: "array[float]"
    text: bytes


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
            planned=_planned(int(last), int(number_)),
        )
        return StepLine(int(number_), step)
    fields = fields_of(line)
    return _step_line(fields) if is_time(fields.get(WORD)) else None


def parse_untimed(line: bytes) -> StepLine | None:
    """What a line without a time says; None if it counts no iteration or has no end: its time may come."""
    fields = fields_of(line) if line.endswith(b"\n") else {}
    return _step_line(fields) if b"iteration" in fields and NUMBER in fields else None


def read_alike(text: bytes) -> Alike | None:
    """All step lines of a text at once; None if one of them is not plain, or has an impossible number."""
    found = ALIKE.findall(text)
    if not found or not len(found) == text.count(WORD) == text.count(ALIKE_NUMBER):  # as where lines ran into each other
        return None
    if text.rfind(GRAD_NORM) >= 0:  # which may be infinite
        return None
    numbers, losses, times = zip(*found, strict=True)
    try:
        alike = Alike([*map(int, numbers)], array("d", map(float, losses)), array("d", map(float, times)), text)
    except ValueError:  # 2.6.9
        return None
    possible = min(alike.times_s) > SHORTEST_STEP_S and max(alike.times_s) < LONGEST_STEP_S
    return alike if possible and math.isfinite(sum(alike.losses)) else None


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


def step_number(fields: dict[bytes, bytes]) -> int | None:
    """The number that the line has for its step, if it can be one."""
    printed = number(fields.get(NUMBER))
    return int(printed) if printed is not None and 0 <= printed < 1e9 and printed.is_integer() else None


def _step_line(fields: dict[bytes, bytes]) -> StepLine:
    printed = step_number(fields)
    number_ = int(fields[b"iteration"]) if printed is None and b"iteration" in fields else printed
    planned = _planned(int(fields.get(b"last iteration", -1)), number_ or 0)
    return step_line(number_, fields, KEYS, planned)


def _planned(last: int, number_: int) -> int | None:
    """Steps of the run, if this can be the number of its last one: in later epochs it is not."""
    return last + 1 if last + 1 > number_ else None
