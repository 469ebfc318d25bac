"""The lines of a log. In: its bytes, a block of whole lines at a time. Out: a `Log`, filled block by block.

Two kinds of lines matter: NeMo's step lines, found by a word that is in all of them, and, between those, the few that
tell how the run ended. Nothing is decoded but what is kept.
"""

import math
import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from ftgen.identity import MOST, Identity

HEAD = b"ftgen plan: "  # ours: the plan, one line of JSON
STEP_TIME = b"train_step_timing in s"
LOSS = b"reduced_train_loss"
FINITE = (LOSS, b"grad_norm")  # what training must keep finite
PEAK_MEMORY = (b"peak_memory_usage", b"max_memory_reserved", b"max_memory_allocated")  # bytes; the first of them counts

# Lines that say how a run ended, each beginning with a literal of its own: that is what makes the search quick.
ENDINGS = {
    "plan": rb"ftgen plan: \{",
    "error": rb"ftgen: error: ",
    "exit": rb"ftgen: exit status (\d{1,9})",
    "job exit": rb"job exited with code (\d{1,9})",
    "task exit": rb"Exited with exit code [1-9]",
    "stopped": rb"`Trainer\.fit` stopped: `max_steps=(\d{1,9})` reached",
    "done": rb"\[after training is done\]",
    "not finite": rb"found NaN in|found Inf in",
    "out of memory": rb"OutOfMemoryError|CUDA out of memory",
    "host memory": rb"oom_kill event|Detected \d+ oom",
    "collective": rb"Watchdog caught collective operation timeout",
    "cancelled": rb"\*\*\* (?:STEP|JOB) [^\r\n]{1,200}? DUE TO ",  # a limit, a node, somebody with more rights
    "killed": rb"\*\*\* (?:STEP|JOB) [^\r\n]{1,200}? CANCELLED",  # by hand, or because another task had failed
    "traceback": rb"Traceback \(most recent call last\)",
}
ENDING = re.compile(b"|".join(ENDINGS.values()))
KINDS = {kind: re.compile(pattern) for kind, pattern in ENDINGS.items()}
# The line that ends a traceback, behind srun's and torch's labels.
EXCEPTION = re.compile(
    rb"(?m)^(?: *\d+: )?(?:\[rank\d+\]: ?)?"
    rb"((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit|Expired)(?::[^\r\n]*)?)\r?$"
)

LINE_END = re.compile(rb"[\r\n]")
ITERATION = re.compile(rb"\biteration (\d{1,9})/(\d{1,9})$")
NUMBER = re.compile(rb"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|NaN|inf|Inf)")

MOST_PLAN = 1 << 20  # bytes
LONGEST_NOTE = 200  # bytes kept of a line, on each side of what is told by it


class Step(NamedTuple):
    """What the step lines of one step said; None is not said, or no number."""

    time_s: float | None  # of the slowest rank that said so
    loss: float | None
    grad_norm: float | None = None
    peak_memory: float | None = None  # bytes
    tflops_per_gpu: float | None = None  # TFLOP/s, as the framework counts them


@dataclass
class Log:
    """What one log says."""

    identity: Identity
    problems: list[str] = field(default_factory=list)  # why less is known than should be
    unread: str | None = None  # why the file is not known to its end
    steps: dict[int, Step] = field(default_factory=dict)  # by number, from 0
    planned: int | None = None  # steps, as the step lines have it
    not_finite: str | None = None  # the first NaN or Inf that training came upon
    global_batch_size: int | None = None  # of the step lines
    other_global_batch_size: int | None = None  # another one
    peak_memory: float | None = None  # bytes
    endings: dict[str, str] = field(default_factory=dict)  # the first line of each kind in ENDINGS
    stopped_at: int | None = None  # the max_steps that training says it reached
    exit_status: int | None = None
    head: bytes = b""  # the plan's JSON
    plan: dict[str, Any] | None = None  # all of it, as plan.json or the head line has it
    environment: dict[str, Any] | None = None  # what the job found around it: versions, GPU, driver, nodes
    attempts: int = 1  # in this one file
    started: datetime | None = None  # the first and the last time that a line tells
    ended: datetime | None = None
    consumed: tuple[int, float] | None = None  # the last line's step, and samples until then

    def start_again(self) -> None:
        """Forget what came before: another attempt begins in the same file."""
        self.__dict__.update(Log(self.identity, self.problems, attempts=self.attempts + bool(self.steps)).__dict__)


def read_block(block: bytes, log: Log) -> None:
    """Step lines to `log.steps`; what lies between them is searched for endings."""
    position = 0
    while (at := block.find(STEP_TIME, position)) >= 0:
        start = max(block.rfind(b"\n", position, at), block.rfind(b"\r", position, at)) + 1 or position
        line_end = LINE_END.search(block, at)
        end = line_end.end() if line_end else len(block)
        if position < start:
            _read_endings(block[position:start], log)
        _read_step(block[start:end], log)
        position = end
    _read_endings(block[position:], log)


def _read_step(line: bytes, log: Log) -> None:
    """One step line into the log: a step that several lines tell of is as slow as the slowest of them says."""
    glued = None if NUMBER.fullmatch(line.rpartition(b": ")[2].strip()) else ENDING.search(line)
    if glued:
        _read_endings(line[glued.start() :], log)  # printed into the step line
    fields = _fields(line)
    printed = _number(fields.get(STEP_TIME))
    if printed is None:
        return
    step = _step_number(fields, log)
    loss = _number(fields.get(LOSS))
    before = log.steps.get(step)
    time_s = printed if 1e-6 < printed < 1e6 else None  # no step is so short, or so long, or NaN
    if before:
        log.steps[step] = Step(max(time_s or 0.0, before.time_s or 0.0) or None, before.loss if loss is None else loss)
    else:
        log.steps[step] = Step(time_s, loss)
    for key in FINITE:
        if key in fields and not math.isfinite(value := _number(fields[key]) or 0.0) and not log.not_finite:
            log.not_finite = f"{key.decode()} is {value} at step {step}"
    _read_batch_size(fields, log)
    memory = next(filter(None, (_number(fields.get(key)) for key in PEAK_MEMORY)), 0.0)
    if 0 < memory < MOST:  # 0 is what a machine without a GPU prints
        log.peak_memory = max(memory, log.peak_memory or 0.0)


def _fields(line: bytes) -> dict[bytes, bytes]:
    """`key: value | key: value` as a dictionary; empty where two lines have run into each other."""
    parts = line.split(b"|")
    if not line.endswith((b"\n", b"\r")):
        parts.pop()  # cut off: 2.6 may have been 2.693
    if not parts:
        return {}
    fields = dict(part.strip().partition(b": ")[::2] for part in parts[1:])
    first = parts[0].rstrip()  # with whatever stands before it
    if iteration := ITERATION.search(first):
        fields[b"iteration"] = iteration.group(1)
        fields[b"last iteration"] = iteration.group(2)
    else:
        label, _, value = first.rpartition(b": ")
        fields[label.rpartition(b": ")[2]] = value
    return fields if len(fields) == len(parts) + bool(iteration) else {}


def _step_number(fields: dict[bytes, bytes], log: Log) -> int:
    """The step's number, from 0: as printed; where it is not, one more than the last if samples were consumed since."""
    iteration = fields.get(b"iteration")
    if iteration:
        log.planned = max(log.planned or 0, int(fields[b"last iteration"]) + 1)
    printed = _number(fields.get(b"global_step"))
    consumed = _number(fields.get(b"consumed_samples")) or 0.0
    if printed is not None and 0 <= printed < 1e9 and printed.is_integer():
        step = int(printed)
    elif iteration:
        step = int(iteration)
    elif log.consumed:
        step = log.consumed[0] + (consumed != log.consumed[1])
    else:
        step = 0
    log.consumed = (step, consumed)
    return step


def _read_batch_size(fields: dict[bytes, bytes], log: Log) -> None:
    size = _number(fields.get(b"global_batch_size"))
    if size is None or not 1 <= size < 1e9:
        return
    if log.global_batch_size is None:
        log.global_batch_size = int(size)
    elif log.global_batch_size != size:
        log.other_global_batch_size = int(size)


def _number(text: bytes | None) -> float | None:
    return float(text) if text and NUMBER.fullmatch(text) else None


def _read_endings(text: bytes, log: Log) -> None:
    """Lines that say how the run ended, and our head line, out of the text between step lines."""
    for match in ENDING.finditer(text):
        kind = next(kind for kind, pattern in KINDS.items() if pattern.match(text, match.start()))
        number = next((int(digits) for digits in match.groups() if digits), None)
        if kind == "plan":
            log.start_again()
            log.head = _line(text, match.end() - 1, MOST_PLAN)
        elif kind == "stopped":
            log.stopped_at = number
        elif kind == "exit" or (kind == "job exit" and "exit" not in log.endings):
            log.exit_status = number  # the last one is the job's, ours before others'
        if kind not in log.endings:
            log.endings[kind] = _note(_line(text, match.start(), LONGEST_NOTE, before=LONGEST_NOTE))
    if "traceback" in log.endings and "exception" not in log.endings:
        start = max(text.find(b"Traceback (most recent call last)"), 0)
        if exception := EXCEPTION.search(text, start):
            log.endings["exception"] = _note(exception.group(1))


def _line(text: bytes, at: int, most: int, *, before: int = 0) -> bytes:
    """The line around `at`, at most `before` bytes before it and `most` after: lines need not end."""
    head = LINE_END.split(text[max(0, at - before) : at])[-1]
    return head + LINE_END.split(text[at : at + most], maxsplit=1)[0]


def _note(line: bytes) -> str:
    return line[: 2 * LONGEST_NOTE].decode("utf-8", "replace").strip()
