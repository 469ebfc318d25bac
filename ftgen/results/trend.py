"""Finds the steps in a series of step times: when they changed, how much, and which versions changed there.

In: `Record`s of one work. Out: a `Series` with its `Change`s.

The change points are those of PELT (Killick, Fearnhead, Eckley 2012; the package ruptures) on the times' ranks, so that
one outlier is no change. Each is then tested: the segments beside it must differ by more than SMALLEST, and so much that
shuffled ones hardly ever do.
"""

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from ftgen.errors import LogError, Problem
from ftgen.results.record import Record, value

SMALLEST = 0.01  # of the step time: less is no change that a user acts on
LEAST = 3  # runs of a segment
CHANCE = 0.0004  # of a difference as large without a change, at most
SHUFFLES = 5000
WORK = ("model", "scheme", "precision", "gpu", "gpus", "global_batch_size", "seq_length", "options")


class Change(NamedTuple):
    """A step in a series."""

    at: int  # the place of the first run after it
    run_id: str
    started: str | None
    before_s: float  # median of the segment before it
    after_s: float
    versions: tuple[str, ...]  # what differs in the environments beside it, such as `torch 2.9 -> 2.11`

    @property
    def ratio(self) -> float:
        """Above 1: slower."""
        return self.after_s / self.before_s


class Series(NamedTuple):
    """The runs of one work, by time, and the changes in it."""

    work: Mapping[str, Any]
    runs: tuple[Record, ...]
    changes: tuple[Change, ...]

    @property
    def times_s(self) -> list[float]:
        """The step times."""
        return [run["results"]["step_time_s"] for run in self.runs]


def series(records: Sequence[Record]) -> list[Series]:
    """A series for each work, of complete runs with a step time and known work, in the order of `records`."""
    timed = [of for of in records if of["results"]["status"] == "complete" and of["results"]["step_time_s"]]
    known = [of for of in timed if None not in _work(of).values()]
    ordered = sorted(known, key=lambda of: str(_work(of)))  # stable: by time within a work
    return [_series(list(runs)) for _, runs in groupby(ordered, lambda of: str(_work(of)))]


def change_points(times_s: Sequence[float]) -> list[int]:
    """The places in a series at which the level changes; LogError if ruptures is not installed."""
    if len(times_s) < 2 * LEAST:
        return []
    points = [0, *_candidates(times_s), len(times_s)]
    while len(points) > 2:
        doubts = [(_chance(times_s, *points[at - 1 : at + 2]), at) for at in range(1, len(points) - 1)]
        worst, at = max(doubts)
        if worst <= CHANCE:
            break
        del points[at]
    return points[1:-1]


def _series(runs: list[Record]) -> Series:
    times = [run["results"]["step_time_s"] for run in runs]
    points = [0, *change_points(times), len(times)]
    changes = [_change(runs, times, *points[at - 1 : at + 2]) for at in range(1, len(points) - 1)]
    return Series(_work(runs[0]), tuple(runs), tuple(changes))


def _change(runs: Sequence[Record], times_s: Sequence[float], start: int, at: int, end: int) -> Change:
    results = runs[at]["results"]
    before, after = statistics.median(times_s[start:at]), statistics.median(times_s[at:end])
    return Change(at, results["run_id"], results["started"], before, after, _versions(runs[at - 1], runs[at]))


def _candidates(times_s: Sequence[float]) -> list[int]:
    try:
        import numpy
        import ruptures
    except ImportError:
        hint = 'pip install "ftgen[history]"'
        raise LogError(Problem((), "finding changes needs the package ruptures, which is not installed", hint)) from None
    ranks = numpy.argsort(numpy.argsort(times_s)) / len(times_s)
    penalty = 2 * float(numpy.var(ranks)) * math.log(len(times_s))
    found = ruptures.Pelt(model="l2", min_size=LEAST, jump=1).fit(ranks.reshape(-1, 1)).predict(pen=penalty)
    return [int(place) for place in found[:-1]]


def _chance(times_s: Sequence[float], start: int, at: int, end: int) -> float:
    """How often shuffled segments differ as much; 1 for a difference that is too small to matter."""
    before, after = times_s[start:at], times_s[at:end]
    low, high = sorted((statistics.median(before), statistics.median(after)))
    if high - low <= SMALLEST * low:
        return 1.0
    pooled, apart = [*before, *after], abs(statistics.fmean(before) - statistics.fmean(after))
    shuffler = random.Random(0)  # noqa: S311 - the same series gives the same answer
    as_far = 0
    for _ in range(SHUFFLES):
        shuffler.shuffle(pooled)
        as_far += abs(statistics.fmean(pooled[: len(before)]) - statistics.fmean(pooled[len(before) :])) >= apart
    return as_far / SHUFFLES


def _versions(before: Record, after: Record) -> tuple[str, ...]:
    """What differs in two environments; the machine's nodes and the job's number change with every run."""
    one, other = (_flat(run["environment"] or {}) for run in (before, after))
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return tuple(f"{name} {one.get(name, '–')} -> {other.get(name, '–')}" for name in sorted(names))


def _flat(environment: Mapping[str, Any]) -> dict[str, str]:
    kept = {name: text for name, text in environment.items() if name not in {"job", "nodes", "packages", "script_sha256"}}
    packages = environment.get("packages")
    return {name: str(text) for name, text in {**kept, **(packages if isinstance(packages, dict) else {})}.items()}


def _work(of: Record) -> dict[str, Any]:
    return {name: value(of, name) for name in WORK}
