"""One step line. In: the line, as NeMo, its progress bar, Megatron-LM or Megatron-Bridge print it. Out: a `StepLine`.

    Training epoch 0, iteration 7/99 | global_step: 7 | reduced_train_loss: 12.81 | train_step_timing in s: 2.693
    Epoch 0: : 8%|█ | 8/100 [00:21<04:07, reduced_train_loss=12.81, global_step=7.000, train_step_timing in s=2.690]
     [2025-12-22 15:18:33] iteration  8/ 100 | elapsed time per iteration (ms): 2693.0 | lm loss: 1.281E+01 |

Numbers are what the line says and nothing else: steps are counted from 0 and seconds are seconds whatever it counts in.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

# The word by which a step line is known.
NEMO = b"train_step_timing in s"
MEGATRON = b"elapsed time per iteration (ms)"
BRIDGE = b"MODEL_TFLOP/s/GPU"

NUMBER = re.compile(rb"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|(?i:nan|inf(?:inity)?))")  # Megatron writes INF
DIGITS = re.compile(rb"[-+.eE\d ]*")
ITERATION = re.compile(rb"\biteration +(\d{1,9})/ *(\d{1,9})$")
BAR = re.compile(rb"(?:\| *(\d{1,9})/(\d{1,9}) )?\[[^\[\]\n]*?, ([^\[\]\n]*)\]")
BRIDGE_LINE = re.compile(rb"Step Time : (\d{1,9}(?:\.\d{1,9})?)s +GPU utilization: (\d{1,9}(?:\.\d{1,9})?)MODEL_TFLOP/s/GPU")

LONGEST_STEP_S, SHORTEST_STEP_S = 1e6, 1e-6  # beyond these no step is
MOST = 1e30  # beyond it a number is no measurement of anything


class Step(NamedTuple):
    """What the step lines of one step said; None is not said, or no number."""

    time_s: float | None  # of the slowest rank that said so
    loss: float | None
    grad_norm: float | None = None
    peak_memory: float | None = None  # bytes
    tflops_per_gpu: float | None = None  # TFLOP/s, as the framework counts them
    global_batch_size: int | None = None
    consumed_samples: float | None = None  # until the step's end
    planned: int | None = None  # steps in all
    fastest_s: float | None = None  # of the fastest rank, where several said so


_step = partial(tuple.__new__, Step)  # Step._make without its check


class StepLine(NamedTuple):
    """One step line."""

    number: int | None  # from 0; None where it is not said
    step: Step
    invalid: str | None = None  # why the step was no training: a loss that is no number, a skipped step
    bar: bool = False  # of a progress bar, which rounds


class StepTime(NamedTuple):
    """Megatron-Bridge's other line of a step, from another rank; it does not say of which step."""

    time_s: float
    tflops_per_gpu: float


class Keys(NamedTuple):
    """What a framework calls things."""

    second: float  # in the line's unit of time
    first: int  # the number of the first iteration
    number: bytes
    names: dict[str, tuple[bytes, ...]]  # by those in `Step`; the first that says something counts
    spoiled: tuple[bytes, ...] = ()  # counts of what must not happen


NEMO_KEYS = Keys(
    second=1.0,
    first=0,
    number=b"global_step",
    names={
        "time_s": (NEMO,),
        "loss": (b"reduced_train_loss",),
        "grad_norm": (b"grad_norm",),
        "tflops_per_gpu": (b"TFLOPS_per_GPU",),
        "global_batch_size": (b"global_batch_size",),
        "consumed_samples": (b"consumed_samples",),
        "peak_memory": (b"peak_memory_usage", b"max_memory_reserved", b"max_memory_allocated"),  # bytes
    },
)
MEGATRON_KEYS = Keys(
    second=1000.0,
    first=1,
    number=b"",
    names={
        "time_s": (MEGATRON,),
        "loss": (b"lm loss",),
        "grad_norm": (b"grad norm",),
        "tflops_per_gpu": (b"throughput per GPU (TFLOP/s/GPU)",),
        "global_batch_size": (b"global batch size",),
        "consumed_samples": (b"consumed samples",),
    },
    spoiled=(b"number of skipped iterations", b"number of nan iterations"),
)


def parse(line: bytes) -> StepLine | None:
    """What a step line says; None if it is none, or is not as it was written."""
    keys = NEMO_KEYS if NEMO in line else MEGATRON_KEYS
    bar = keys is NEMO_KEYS and NEMO + b"=" in line
    fields = _bar_fields(line) if bar else _fields(line)
    time = fields.get(NEMO if keys is NEMO_KEYS else MEGATRON, b"none")
    if number(time) is None and not DIGITS.fullmatch(time):
        return None
    last = fields.get(b"last iteration")
    numbers = ((name, number(fields.get(key))) for name, key in _named(keys, fields))
    said = {name: (value,) for name, value in numbers if value is not None}
    planned = int(last) + 1 - keys.first if last else int(fields.get(b"of") or 0)
    columns = columns_of({"time_s": (0.0,), **said}, keys) | ({"planned": (planned,)} if planned else {})
    (step,) = steps_of(columns, 1)
    return StepLine(_step_number(fields, keys), step, _invalid(fields, keys), bar)


def columns_of(said: Mapping[str, Sequence[float]], keys: Keys) -> dict[str, Sequence[Any]]:
    """What several steps say of each thing, by the names in `Step`: in its units, and None for what cannot be."""
    times = said["time_s"] if keys.second == 1 else [time_s / keys.second for time_s in said["time_s"]]
    columns: dict[str, Sequence[Any]] = {**said, "time_s": _within(times, SHORTEST_STEP_S, LONGEST_STEP_S)}
    if "peak_memory" in said:
        columns["peak_memory"] = _within(said["peak_memory"], 0, MOST)  # 0 is said without a GPU
    if "global_batch_size" in said:
        columns["global_batch_size"] = [int(size) if 1 <= size < 1e9 else None for size in said["global_batch_size"]]
    return columns


def steps_of(columns: Mapping[str, Sequence[Any]], count: int) -> Iterator[Step]:
    """So many steps of what they say of each thing."""
    nothing = (None,) * count
    return map(_step, zip(*(columns.get(name, nothing) for name in Step._fields), strict=True))


def _within(numbers: Sequence[float], least: float, most: float) -> Sequence[float | None]:
    """None in place of what is not between the two; NaN is not, where it is alone."""
    if least < min(numbers) <= max(numbers) < most:
        return numbers
    return [number if least < number < most else None for number in numbers]


def cells_of(line: bytes, keys: Keys) -> Iterator[tuple[str, int, bytes]]:
    """What a line may say: its name, the number of the cell between |, from 0, and what stands before the number there.

    Of several cells for one thing the first counts that does not say 0.
    """
    rows = [cell.partition(b":")[0] for cell in line.split(b"|")]
    cells = {before.strip(): (place, before + b":") for place, before in enumerate(rows)}
    for name, several in keys.names.items():
        yield from ((name, *cells[key]) for key in several if key in cells)


def is_damaged(line: bytes, keys: Keys, varying: bytes) -> bool:
    """Whether a key is one that the framework writes but for some `varying` bytes."""
    known = {key.translate(None, varying): key for several in keys.names.values() for key in several}
    known |= {key.translate(None, varying): key for key in (keys.number, *keys.spoiled) if key}
    found = [cell.partition(b":")[0].strip() for cell in line.split(b"|")]
    return any(known.get(key.translate(None, varying), key) != key for key in found)


def _named(keys: Keys, fields: Mapping[bytes, bytes]) -> Iterator[tuple[str, bytes]]:
    """What the fields say, by name; of several keys for one thing the first that does not say 0."""
    for name, several in keys.names.items():
        there = [key for key in several if key in fields]
        if len(there) > 1:
            there = [key for key in there if number(fields[key]) != 0] or there
        if there:
            yield name, there[0]


def parse_step_time(line: bytes) -> StepTime | None:
    """What Megatron-Bridge's line of a step's time says."""
    match = BRIDGE_LINE.search(line)
    return StepTime(float(match[1]), float(match[2])) if match else None


def number(text: bytes | None) -> float | None:
    """The number that the text is; None for any other text."""
    text = text.strip() if text else b""
    return float(text) if NUMBER.fullmatch(text) else None


def _fields(line: bytes) -> dict[bytes, bytes]:
    """`key: value | key: value` as a dictionary; empty where two lines have run into each other."""
    parts = line.split(b"|")
    if not line.endswith(b"\n"):
        parts.pop()  # cut off: 2.6 may have been 2.693
    if not parts:
        return {}
    if not parts[-1].strip():
        parts.pop()  # Megatron ends its lines with a |
    fields = dict(part.strip().partition(b":")[::2] for part in parts[1:])
    first = parts[0].rstrip() if parts else b""  # with whatever stands before it
    iteration = ITERATION.search(first)
    if iteration:
        fields[b"iteration"], fields[b"last iteration"] = iteration.group(1, 2)
    else:
        label, _, value = first.rpartition(b": ")
        fields[label.rpartition(b": ")[2]] = value
    return fields if len(fields) == len(parts) + bool(iteration) else {}


def _bar_fields(line: bytes) -> dict[bytes, bytes]:
    """`| 50/50 [23:22<00:00, key=value, key=value]` as a dictionary; empty where it is not whole."""
    match = BAR.search(line)
    if not match or line.count(NEMO) != 1:
        return {}
    fields = dict(part.partition(b"=")[::2] for part in match[3].split(b", "))
    if match[1]:
        fields[b"count"], fields[b"of"] = match.group(1, 2)
    return fields


def _step_number(fields: dict[bytes, bytes], keys: Keys) -> int | None:
    """The step's number, from 0, as printed; the iteration's where it is not."""
    printed = number(fields.get(keys.number))
    if printed is not None and 0 <= printed < 1e9 and printed.is_integer():
        return int(printed)
    if iteration := fields.get(b"iteration"):
        return max(int(iteration) - keys.first, 0)
    return max(int(fields[b"count"]) - 1, 0) if fields.get(b"count") else None


def _invalid(fields: dict[bytes, bytes], keys: Keys) -> str | None:
    for key in (*keys.names["loss"], *keys.names["grad_norm"]):
        value = number(fields.get(key))
        if value is not None and not math.isfinite(value):
            return f"{key.decode()} is {value}"
    for key in keys.spoiled:
        if number(fields.get(key)):
            return f"{key.decode()} is {fields[key].strip().decode()}"
    if keys is MEGATRON_KEYS and b"lm loss" not in fields:
        return "lm loss is left out, as Megatron does with NaN,"
    return None
