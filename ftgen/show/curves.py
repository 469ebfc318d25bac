"""What a run's charts need of its steps. In: `Steps`, of any length. Out: `Curves`, of a size that does not grow with them.

The steps are gone through once, some at a time; a long run leaves 8 bytes a step meanwhile, for the median of their times.
"""

import math
from array import array
from collections.abc import Mapping
from operator import itemgetter
from statistics import median
from typing import NamedTuple

from ftgen.logs.step import Step
from ftgen.logs.steps import Steps
from ftgen.units import number, significant

MOST_POINTS = 400  # of a curve; more are drawn by the lowest and highest of each part
MOST_STEPS = 1000  # rows of a run's table of steps
OFF_SCALE = 3  # times the median: a step that takes longer is drawn at the edge, with its value

Point = tuple[int, float]  # a step, and its value


class Curve(NamedTuple):
    """What is known and finite of one thing, by step; thinned where there is much of it."""

    points: list[Point]
    known: int = 0  # steps
    first: float | None = None
    last: float | None = None
    middle: float | None = None  # the median, of times
    beyond: int = 0  # steps that took more than OFF_SCALE times as long


class Curves(NamedTuple):
    """A run's steps, drawn and as a table."""

    times: Curve
    losses: Curve
    rows: list[tuple[str, ...]]  # of every step; of very long runs none
    validation: Curve = Curve([])  # loss of the held-out examples


def curves(steps: Steps, validations: Mapping[int, float] | None = None) -> Curves:
    """All that the page shows of a run's steps. `validations`: loss by the number of steps before it."""
    total = len(steps)
    times, losses = _Line(total), _Line(total)
    seconds = array("d")
    for step, time_s, loss in steps.curve():
        if times.add(step, time_s):
            seconds.append(time_s or 0.0)
        losses.add(step, loss)
    rows = list(map(_row, steps.between(0, steps.last + 1).items())) if total <= MOST_STEPS else []
    middle = median(seconds) if seconds else None
    beyond = sum(time_s > OFF_SCALE * middle for time_s in seconds) if middle else 0
    validation = _Line(len(validations or {}))
    for step, loss in sorted((validations or {}).items()):
        validation.add(step, loss)
    return Curves(times.curve()._replace(middle=middle, beyond=beyond), losses.curve(), rows, validation.curve())


class _Line:
    """A curve in the making, of at most so many points."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.known = 0
        self.first: float | None = None
        self.last: float | None = None
        self.parts: dict[int, list[Point]] = {}

    def add(self, step: int, value: float | None) -> bool:
        """Take the next step's value, if it is known and finite."""
        if value is None or not math.isfinite(value):
            return False
        points = self.parts.setdefault(self.known * (MOST_POINTS // 2) // self.total, [])
        points.append((step, value))
        if len(points) > 2 and self.total > MOST_POINTS:
            points[:] = [min(points, key=itemgetter(1)), max(points, key=itemgetter(1))]
        self.known += 1
        self.first = value if self.first is None else self.first
        self.last = value
        return True

    def curve(self) -> Curve:
        """What has come of it."""
        points = sorted({point for part in self.parts.values() for point in part})
        return Curve(points, self.known, self.first, self.last)


def _row(step: tuple[int, Step]) -> tuple[str, ...]:
    said = step[1]
    figures = (significant(each, 4) for each in (said.time_s, said.loss, said.grad_norm))
    return (str(step[0]), *figures, number(said.peak_memory / 2**30 if said.peak_memory else None, 2))
