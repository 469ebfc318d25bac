"""How often a run logs its steps. In: its `Steps`. Out: `Logged`: every how many steps, and what is missing.

Megatron prints a line each `log_interval` steps, counted from 1, with the mean time of those steps; NeMo with
`log_every_n_steps` that of one of them. A line so stands for the steps since the one before.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from ftgen.logs.steps import Steps


class Logged(NamedTuple):
    """What the numbers of a run's steps tell."""

    made: int  # steps that the run made, as far as its lines tell
    every: int = 1  # steps from one line to the next
    wrong: int | None = None  # the first step that should have a line and has none, or has one out of turn


def logged(steps: Steps, planned: int | None) -> Logged:
    """How the steps are logged; every single one, unless most of them have the same distance from the one before."""
    there = len(steps)
    if there == steps.last + 1:
        return Logged(there)
    numbers = list(steps)
    every = _every(numbers)
    if every == 1:
        return Logged(there)
    ((phase, _),) = Counter(number % every for number in numbers).most_common(1)
    due = range(phase, steps.last + 1, every)
    besides = {0, *([planned - 1] if planned else [])}  # some print the first step and the last one as well
    lost = set(due).difference(numbers)
    wrong = lost | set(numbers).difference(due, besides)
    return Logged(steps.last + 1 - every * len(lost), every, min(wrong, default=None))


def _every(numbers: Sequence[int]) -> int:
    """The distance that most of the steps have from the one before; 1 where it is not plain."""
    distances = Counter(after - before for before, after in pairwise(numbers))
    if not distances:
        return 1
    every, times = distances.most_common(1)[0]
    if times == 1:  # two lines, or three: of the iterations 50 and 100, or 1, 50 and 100
        every = numbers[-1] - numbers[-2]
        return every if numbers[-2] + 1 == every and len(numbers) - (numbers[0] == 0) == 2 else 1
    return every if 2 * times >= distances.total() else 1
