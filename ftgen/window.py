"""The steps whose mean is a run's step time. In: `20` (the last 20) or `80-99`. Out: their times, or why there is none.

Steps are numbered from 0, as NeMo prints them, whatever the framework that wrote the log counts from.
"""

import re
from collections.abc import Mapping
from math import fsum, sqrt
from typing import NamedTuple

from ftgen.errors import LogError, Problem
from ftgen.log_lines import Step

Window = int | range  # so many last steps, or from the first to before the end
RECIPE_WINDOW = 20  # steps

WINDOW = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


class Timed(NamedTuple):
    """A window with a time for each of its steps, or why there is no such window."""

    first: int | None
    last: int | None
    times_s: tuple[float, ...]
    why_not: str | None = None

    @property
    def mean_s(self) -> float | None:
        """The mean step time in seconds: of all the window's steps or of none."""
        return fsum(self.times_s) / len(self.times_s) if self.times_s else None

    @property
    def spread(self) -> float | None:
        """The standard deviation (of a sample) as a fraction of the mean; None of fewer than two steps."""
        if len(self.times_s) < 2 or not self.mean_s:
            return None
        squares = fsum((time_s - self.mean_s) ** 2 for time_s in self.times_s)
        return sqrt(squares / (len(self.times_s) - 1)) / self.mean_s


def read_window(text: str) -> Window:
    """`N`, the last N steps, or `A-B`, the steps from A to B; LogError for anything else."""
    match = WINDOW.fullmatch(text.strip())
    if not match:
        raise LogError(Problem(("window",), f"must be a number of steps (20) or a first and a last (80-99), found {text}"))
    if match[2] is None:
        return checked(int(match[1]))
    return checked(range(int(match[1]), int(match[2]) + 1))


def checked(window: Window) -> Window:
    """The window, if there can be steps in it; LogError."""
    if isinstance(window, int) and window < 1:
        raise LogError(Problem(("window",), f"must be at least 1 step, found {window}"))
    if isinstance(window, range) and not window:
        raise LogError(Problem(("window",), f"must not end before it begins, found {window.start}-{window.stop - 1}"))
    return window


def timed(steps: Mapping[int, Step], window: Window) -> Timed:
    """The window's steps and their times: it is of all of them or of none."""
    if isinstance(window, int):
        if len(steps) < window:
            return Timed(None, None, (), f"{count(len(steps), 'step')}, the window needs {window}: no step time is reported")
        window = range(max(steps) - window + 1, max(steps) + 1)
    first, last = window[0], window[-1]
    times = []
    for number in window:
        time_s = steps[number].time_s if number in steps else None
        if time_s is None:
            what = "has no time" if number in steps else "is missing"
            why = f"step {number} {what}, the window needs {first} to {last}: no step time is reported"
            return Timed(first, last, (), why)
        times.append(time_s)
    return Timed(first, last, tuple(times))


def count(number: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
