"""What the GPUs of a run did while it ran. In: the telemetry files beside a log. Out: a `Node` for each file.

A file has a head with the GPUs of its node, then a sample a second and the end of each step (runtime/node/sampler.py). Each
attempt of a run begins with a head of its own. Samples are parsed when somebody asks for them: a day has 86,400 of them.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from ftgen.logs.identity import document

FORMAT = 1
FIGURES = ("power_w", "energy_j", "sm_clock_mhz", "throttle_reasons", "temperature_c")  # those that results need
TIME = re.compile(rb'\{"time_s":(\d{1,12}(?:\.\d{1,9})?),')
STEP = re.compile(rb'\{"step":(-?\d{1,15}),"time_s":(\d{1,12}(?:\.\d{1,9})?)\}')
LARGEST = 1e15  # no figure is larger; a counter of joules reaches 7e11 in 30 years

Values = Sequence[float | None]  # of each GPU
Sample = Mapping[str, Values]


@dataclass
class Attempt:
    """The samples of one attempt, in the order of time, and when its steps ended."""

    gpus: int
    times_s: list[float] = field(default_factory=list)  # of the samples, since 1970
    ends_s: dict[int, float] = field(default_factory=dict)  # by step, from 0; that of the step before the first is its begin
    _lines: list[bytes] = field(default_factory=list)
    _parsed: dict[int, Sample] = field(default_factory=dict)

    def add(self, time_s: float, line: bytes) -> None:
        """Take a sample. One whose time is not after the last one's is left out: somebody has set the clock."""
        if not self.times_s or time_s > self.times_s[-1]:
            self.times_s.append(time_s)
            self._lines.append(line)

    def sample(self, place: int) -> Sample:
        """The figures of each GPU; None for what the sample does not have."""
        if place not in self._parsed:
            self._parsed[place] = _figures(self._lines[place], self.gpus)
        return self._parsed[place]

    def around(self, begin_s: float, end_s: float) -> range:
        """The places of the samples from the last one before the time to the first one after it; empty if one is missing."""
        first, last = bisect_right(self.times_s, begin_s) - 1, bisect_left(self.times_s, end_s)
        return range(first, last + 1) if first >= 0 and last < len(self.times_s) else range(0)


@dataclass
class Node:
    """What one node recorded."""

    name: str
    attempts: list[Attempt] = field(default_factory=list)

    def attempt_with(self, step: int) -> Attempt | None:
        """The last attempt that has the begin and the end of a step."""
        found = (each for each in reversed(self.attempts) if {step - 1, step} <= each.ends_s.keys())
        return next(found, None)


def read(paths: Iterable[Path]) -> tuple[list[Node], list[str]]:
    """Every node with a sample, and why others have none."""
    nodes, problems = [], []
    for path in paths:
        try:
            text = path.read_bytes()
        except OSError as error:
            problems.append(f"{path.name} cannot be read: {error.strerror}")
            continue
        node = parse(text)
        if node and any(each.times_s for each in node.attempts):
            nodes.append(node)
        else:
            problems.append(f"{path.name} has no sample")
    return nodes, problems


def parse(text: bytes) -> Node | None:
    """The node of a file's text; None if it has no head. A line that is none, such as a torn one, is left out."""
    node: Node | None = None
    for line in text.splitlines():
        if sample := TIME.match(line):
            if node:
                node.attempts[-1].add(float(sample[1]), line)
        elif step := STEP.fullmatch(line):
            if node:
                node.attempts[-1].ends_s[int(step[1])] = float(step[2])
        elif (head := document(line)) and head.get("format") == FORMAT and isinstance(head.get("gpus"), list):
            node = node or Node(str(head.get("node")))
            node.attempts.append(Attempt(len(head["gpus"])))
    return node


def _figures(line: bytes, gpus: int) -> Sample:
    said = document(line) or {}
    nothing: Values = [None] * gpus
    return {name: _numbers(said.get(name), gpus) or nothing for name in FIGURES}


def _numbers(values: Any, gpus: int) -> Values | None:
    if not isinstance(values, list) or len(values) != gpus:
        return None
    return [value if _is_number(value) else None for value in values]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) and 0 <= value < LARGEST
