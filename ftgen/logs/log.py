"""The lines of a log. In: its text, a block of whole lines at a time. Out: what is in them, in order; and a `Log` of all.

`scan` knows nothing of what came before, so that blocks can be looked through by several processes; `Log.take` puts what
was found together.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from datetime import datetime
from itertools import groupby
from typing import Any

from ftgen.logs.blocks import Block
from ftgen.logs.chunk import FEW, Chunk, barest, chunk_of, shape_of, whole_chunk
from ftgen.logs.failures import ENDING, Ending, endings, survey
from ftgen.logs.identity import Identity
from ftgen.logs.step_line import BRIDGE, MEGATRON, NEMO, Step, StepLine, StepTime, parse, parse_step_time
from ftgen.logs.steps import Steps

__all__ = ["Log", "Step", "scan"]

Item = Chunk | StepLine | StepTime | Ending | str  # a text is a line that is damaged

ANY_STEP_WORD = re.compile(b"|".join(map(re.escape, (NEMO, MEGATRON, BRIDGE))))
HEAD = b"ftgen plan: {"  # ours: the plan, one line of JSON
LONGEST_LINE = 1 << 16  # bytes that are looked at of a step line


class Log:
    """What one log says."""

    def __init__(self, identity: Identity, steps: Steps | None = None) -> None:
        self.identity = identity
        self.problems: list[str] = []  # why less is known than should be
        self.unread: str | None = None  # why the file is not known to its end
        self.attempts = 1  # in this one file
        self.started: datetime | None = None  # the first and the last time that a line tells
        self.ended: datetime | None = None
        self._begin(steps or Steps())

    def _begin(self, steps: Steps) -> None:
        """What is known of an attempt before anything is."""
        self.steps = steps
        self.invalid: str | None = None  # the first thing that makes what was trained worthless
        self.damaged = 0  # step lines that could not be read
        self.endings: dict[str, Ending] = {}  # the first line of each kind
        self.stopped_at: int | None = None  # the max_steps that training says it reached
        self.exit_status: int | None = None
        self.head = b""  # the plan's JSON
        self.plan: dict[str, Any] | None = None  # all of it, as plan.json or the head line has it
        self.environment: dict[str, Any] | None = None  # what the job found around it: versions, GPU, driver, nodes
        self.step_times: list[StepTime] = []  # Megatron-Bridge's, which do not say of which step

    def __repr__(self) -> str:
        return f"Log({self.__dict__})"

    def take(self, item: Item, again: Callable[[Chunk], Chunk]) -> None:
        """The next thing that was found; `again` is how to read a chunk of its block once more."""
        if isinstance(item, Chunk):
            self.steps.add_chunk(item, again)
        elif isinstance(item, StepLine):
            self._take_line(item)
        elif isinstance(item, StepTime):
            self.step_times.append(item)
        elif isinstance(item, Ending):
            self._take_ending(item)
        else:
            self.damaged += 1

    def copy(self) -> "Log":
        """A log of its own that has read as far: what one takes the other has not."""
        other = copy(self)
        other.problems, other.endings, other.step_times = [*self.problems], {**self.endings}, [*self.step_times]
        other.steps = self.steps.copy()
        return other

    def other_lines(self, numbers: Iterable[int]) -> dict[int, StepTime]:
        """Megatron-Bridge's other lines of some steps: the n-th is the n-th step's, if there is one for each step."""
        if not self.step_times or len(self.step_times) != len(self.steps):
            return {}
        first = next(iter(self.steps))
        if self.steps.last - first + 1 == len(self.steps):
            return {number: self.step_times[number - first] for number in numbers}
        places = {number: place for place, number in enumerate(self.steps)}
        return {number: self.step_times[places[number]] for number in numbers}

    def _take_line(self, line: StepLine) -> None:
        number = line.number
        if number is None:
            number = self._next(line)
        if line.invalid and not self.invalid:
            self.invalid = f"{line.invalid} at step {number}"
        self.steps.add(line, number)

    def _next(self, line: StepLine) -> int:
        """A step's number where none is said: one more than the last if samples were consumed since."""
        last = self.steps.last
        if last < 0:
            return 0
        return last + (line.step.consumed_samples != self.steps[last].consumed_samples)

    def _take_ending(self, ending: Ending) -> None:
        kind = ending.kind
        if kind == "plan":
            self.attempts += bool(self.steps)
            self._begin(Steps())
            self.head = ending.json
        elif kind == "stopped":
            self.stopped_at = ending.number
        elif kind == "exit" or (kind == "job exit" and "exit" not in self.endings):
            self.exit_status = ending.number  # the last one is the job's, ours before others'
        elif kind == "environment":
            self.environment = _json(ending.json)
        self.endings.setdefault(kind, ending)


def _json(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def scan(block: Block) -> list[Item]:
    """What is in a block, in the lines' order as far as it matters; endings know their place in the file."""
    found = scan_text(block.text)
    searched: dict[bytes, int] = {}
    for place, item in enumerate(found):
        if isinstance(item, Ending):
            at = max(block.raw.find(item.line, searched.get(item.line, 0)), 0)
            searched[item.line] = at + 1
            found[place] = item._replace(at=block.offset + at)
    return found


def scan_text(text: bytes) -> list[Item]:
    """What is in some lines."""
    end = text.rfind(b"\n") + 1
    if end == len(text) and (chunk := whole_chunk(text)):
        return [chunk]
    found = list(_scan_lines(text[:end] if end < len(text) else text)) if end else []
    if end < len(text):
        found += _scan_lines(text[end:])  # a line that was not finished
    return found


def _scan_lines(text: bytes) -> Iterator[Item]:
    words = [NEMO] if NEMO in text else [word for word in (MEGATRON, BRIDGE) if word in text]
    if not words:
        yield from endings(text)
        return
    start = text.rfind(b"\n", 0, min(map(text.find, words))) + 1
    stop = text.find(b"\n", max(map(text.rfind, words))) + 1 or len(text)
    if b"{" in text and text.find(HEAD, start, stop) >= 0:
        at = text.rfind(b"\n", 0, text.find(HEAD, start)) + 1
        if start < at < stop:  # another attempt, between its steps and those before it
            yield from _scan_lines(text[:at])
            yield from _scan_lines(text[at:])
            return
    yield from endings(text[:start])
    chunk = None if BRIDGE in words else whole_chunk(text[start:stop])
    if chunk:
        yield chunk
    else:
        yield from _scan_mixed(text[start:stop], words)
    yield from endings(text[stop:])


def _scan_mixed(text: bytes, words: list[bytes]) -> Iterator[Item]:
    """Step lines, neighbours of one shape together, and what tells of an ending between them."""
    if len(words) == 1 and words[0] != BRIDGE:
        told, places = survey(text, words[0])
        if not told and (chunk := whole_chunk(_only(text, places))):
            yield chunk
            return
    lines, others = _separate(text, words)
    if HEAD in text:
        for line in text.splitlines(keepends=True):
            yield from _scan_one(line) if ANY_STEP_WORD.search(line) else endings(line)
        return
    for _, group in groupby(lines, barest):
        alike = list(group)
        shape = shape_of(alike[0]) if len(alike) >= FEW else None
        chunk = chunk_of(b"".join(alike), len(alike), shape, even=False) if shape else None
        if chunk:
            yield chunk
        else:
            for line in alike:
                yield from _scan_one(line)
    yield from endings(others)


def _only(text: bytes, places: Iterable[int]) -> bytes:
    """The lines in which the places are; nothing where two are in a line, or one in a line without end."""
    lines, position = [], 0
    for at in places:
        if at < position:
            return b""
        start = text.rfind(b"\n", position, at) + 1 or position
        position = text.find(b"\n", at) + 1
        if not position:
            return b""
        lines.append(text[start:position])
    return b"".join(lines)


def _separate(text: bytes, words: list[bytes]) -> tuple[list[bytes], bytes]:
    """The step lines, and the text between them."""
    word = re.compile(b"|".join(map(re.escape, words)))
    places = _places(text, words[0]) if len(words) == 1 else (match.start() for match in word.finditer(text))
    lines, others, position = [], [], 0
    for at in places:
        if at < position:
            continue
        start = text.rfind(b"\n", position, at) + 1 or position
        end = text.find(b"\n", at) + 1 or len(text)
        lines.append(text[start:end])
        others.append(text[position:start])
        position = end
    others.append(text[position:])
    return lines, b"".join(others)


def _places(text: bytes, word: bytes) -> Iterable[int]:
    at = text.find(word)
    while at >= 0:
        yield at
        at = text.find(word, at + len(word))


def _scan_one(line: bytes) -> Iterator[Item]:
    """One line with a step word in it; what another process printed into it counts as well."""
    line = line[:LONGEST_LINE]
    read = parse(line) if NEMO in line or MEGATRON in line else parse_step_time(line)
    if read is None:
        printed_into = ENDING.search(line)
        yield from endings(line[printed_into.start() :] if printed_into else b"")
        yield line[:200].decode("utf-8", "replace").strip()
    else:
        yield read
