"""How often a run logs its steps. In: its `Steps`. Out: a `Logged`: the interval, and the first missing step.

Megatron prints a line every `log_interval` steps, counted from 1, with the mean time of those steps. NeMo prints a line
every `log_every_n_steps` steps, with the time of one of them. So a line stands for all steps since the line before.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from ftgen.logs.steps import Steps


class Logged(NamedTuple):
    """What the step numbers of a run show."""

    made: int  # steps that the run made, judged by its lines
    every: int = 1  # steps from one line to the next
    wrong: int | None = None  # the first step whose line is missing or out of order
    first: int = 0  # the step that the log begins with: above 0 where it goes on from a checkpoint


def logged(steps: Steps, planned: int | None) -> Logged:
    """How often the steps are logged: every one, unless most of them have the same distance from the one before."""
    there = len(steps)
    if there == steps.last + 1:
        return Logged(there)
    numbers = list(steps)
    first = numbers[0] if numbers else 0
    every = _every(numbers)
    if every == 1:
        return Logged(there, first=first)
    ((phase, _),) = Counter(number % every for number in numbers).most_common(1)
    due = range(phase, steps.last + 1, every)
    besides = {0, *([planned - 1] if planned else [])}  # some frameworks print the first and the last step as well
    lost = set(due).difference(numbers)
    wrong = lost | set(numbers).difference(due, besides)
    return Logged(steps.last + 1 - every * len(lost), every, min(wrong, default=None))


def _every(numbers: Sequence[int]) -> int:
    """The distance that most steps have from the one before; 1 if there is no such distance."""
    distances = Counter(after - before for before, after in pairwise(numbers))
    if not distances:
        return 1
    every, times = distances.most_common(1)[0]
    if times == 1:  # two or three lines: iterations 50 and 100, or 1, 50 and 100
        every = numbers[-1] - numbers[-2]
        return every if numbers[-2] + 1 == every and len(numbers) - (numbers[0] == 0) == 2 else 1
    return every if 2 * times >= distances.total() else 1
