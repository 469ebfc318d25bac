"""The steps whose mean is a run's step time. In: `20` (the last 20) or `80-99`. Out: those steps, or the reason for none.

Steps are numbered from 0, as NeMo prints them, even if the framework that wrote the log counts from 1.
"""

import re
from collections.abc import Mapping, Sequence, Set
from itertools import pairwise
from math import fsum, sqrt
from operator import mul
from typing import NamedTuple

from ftgen.errors import LogError, Problem
from ftgen.logs.step import Step
from ftgen.logs.steps import Steps
from ftgen.results.interval import Logged

Window = int | range  # the number of last steps, or the steps themselves
RECIPE_WINDOW = 20  # steps

WINDOW = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


class Timed(NamedTuple):
    """A window with the time of each of its steps, or the reason why it has no step time."""

    first: int | None
    last: int | None
    steps: Mapping[int, Step]  # those steps of the window that the log has, in ascending order
    times_s: tuple[float, ...] = ()
    why_not: str | None = None
    mean_s: float | None = None  # the mean step time of all the window's steps, in seconds; None if one is missing
    spread: float | None = None  # sample standard deviation by the mean; None for fewer than two steps
    every: int = 1  # steps from one time to the next
    left_out: int = 0  # steps whose time does not count: they come directly after a save, a validation or a resume


def read_window(text: str) -> Window:
    """Read `N`, the last N steps, or `A-B`, the steps from A to B. LogError for any other text."""
    match = WINDOW.fullmatch(text.strip())
    if not match:
        what = f"must be a number of steps (20) or a first and a last (80-99), found {text}"
        raise LogError(Problem(("window",), what))
    return checked(int(match[1]) if match[2] is None else range(int(match[1]), int(match[2]) + 1))


def checked(window: Window) -> Window:
    """The window unchanged; LogError if it can have no steps."""
    if isinstance(window, int) and window < 1:
        raise LogError(Problem(("window",), f"must be at least 1 step, found {window}"))
    if isinstance(window, range) and not window:
        raise LogError(Problem(("window",), f"must not end before it begins, found {window.start}-{window.stop - 1}"))
    return window


def timed(steps: Steps, window: Window, lines: Logged, slow: Set[int] = frozenset()) -> Timed:
    """The window's steps and their times. The step time is the mean of all of them; if one is missing there is none.

    `slow` are steps that take longer for a reason that is not the training's: they do not count, unless there are no others.
    """
    if isinstance(window, int):
        there = lines.made
        if there < window:
            what = f"the window needs {window} steps, but the log has {there}: no step time is reported"
            what += f" (try --window {max(1, there // 2)})" if there > 1 else ""
            return Timed(None, None, steps.between(0, steps.last + 1), (), what)
        window = range(steps.last - window + 1, steps.last + 1)
    first, last = window[0], window[-1]
    found = steps.between(first, last + 1)
    if lines.every > 1:
        return _timed_at_intervals(found, window, lines)
    times = [step.time_s for step in found.values() if step.time_s is not None]
    if len(times) == len(window):
        counted = {number: step for number, step in found.items() if number not in slow} or found
        times = [step.time_s for step in counted.values() if step.time_s is not None]
        mean_s = fsum(times) / len(times)
        left_out = len(found) - len(counted)
        return Timed(first, last, counted, tuple(times), None, mean_s, _spread(times, mean_s), left_out=left_out)
    number = next(number for number in window if number not in found or found[number].time_s is None)
    what = "has no time" if number in found else "is missing"
    return Timed(
        first,
        last,
        found,
        (),
        f"step {number} {what}, but the window needs steps {first} to {last}: no step time is reported",
    )


def _timed_at_intervals(found: Mapping[int, Step], window: range, lines: Logged) -> Timed:
    """For a run that does not log every step: each time counts for the steps of the window that it stands for."""
    first, last, every = window[0], window[-1], lines.every
    part = Timed(first, last, found, every=every)
    numbers = list(found)
    times = [step.time_s for step in found.values() if step.time_s is not None]
    asked = f"but the window needs steps {first} to {last}: no step time is reported"
    if not numbers:
        return part._replace(why_not=f"the log has no step from {first} to {last}: no step time is reported")
    if len(times) < len(numbers):
        number = next(number for number in numbers if found[number].time_s is None)
        return part._replace(why_not=f"step {number} has no time, {asked}")
    lost = [after - every for before, after in pairwise([first - 1, *numbers]) if after - before > every]
    if lost or last - numbers[-1] >= every:
        return part._replace(why_not=f"step {lost[0] if lost else numbers[-1] + every} is missing, {asked}")
    weights = [number - before for before, number in pairwise([first - 1, *numbers])]
    mean_s = fsum(map(mul, weights, times)) / sum(weights)
    return part._replace(times_s=tuple(times), mean_s=mean_s, spread=_spread(times, mean_s))


def _spread(times_s: Sequence[float], mean_s: float) -> float | None:
    if len(times_s) < 2:
        return None
    apart = [time_s - mean_s for time_s in times_s]
    return sqrt(fsum(map(mul, apart, apart)) / (len(times_s) - 1)) / mean_s


def count(number: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
