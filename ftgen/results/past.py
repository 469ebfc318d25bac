"""The history as a baseline. In: `Record`s, and which of them count. Out: a `Baseline`."""

import math
import statistics
from collections.abc import Collection, Iterable, Sequence

from ftgen.errors import LogError, Problem
from ftgen.results.baseline import Result
from ftgen.results.compare import TOLERANCE, Baseline, Work, scaled, way_of
from ftgen.results.record import Record
from ftgen.validation import validate

HISTORY = "history"
WHICH = ("median", "best", "last")
LEAST = 3  # repeats that tell of noise
# Student's t for 99.5%, by degrees of freedom from 2 on; NIST/SEMATECH e-Handbook of Statistical Methods, table 1.3.6.7.2
T_995 = (9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.250, 3.169, 3.106, 3.055, 3.012, 2.977, 2.947, 2.921, 2.898)


def is_history(name: str) -> bool:
    """Whether --baseline names the history."""
    return name == HISTORY or name.startswith(f"{HISTORY}:")


def read_which(name: str) -> str:
    """`median` of `history`, `best` of `history:best`. LogError for another word."""
    which = name.partition(":")[2] or WHICH[0]
    if which not in WHICH:
        raise LogError(Problem(("baseline",), f"must be history:{'|'.join(WHICH)}, found {name}"))
    return which


class Past(Result):
    """A run of the history."""

    run_id: str


def past(
    records: Iterable[Record], which: str, without: Collection[tuple[str, str]] = (), tolerance: float = TOLERANCE
) -> Baseline:
    """The median, the best or the last step time of each work. `without`: experiment and id of runs that do not count.

    From three repeats on, their spread says how much slower a run may be by chance (99.5%, one-sided).
    """
    same: dict[Work, list[Past]] = {}
    for run in filter(None, (validate(Past, dict(record["results"]))[0] for record in records)):
        if run.status == "complete" and run.step_time_s and (run.experiment, run.run_id) not in without:
            same.setdefault(way_of(run), []).append(run)
    figures = {work: scaled(runs[-1], _chosen(runs, which)) for work, runs in same.items()}
    noise = {work: found for work, runs in same.items() if (found := _noise(runs, which)) is not None}
    return Baseline(f"{HISTORY}, {which}", figures, tolerance, noise=noise)


def _chosen(runs: Sequence[Past], which: str) -> float:
    times_s = _times_s(runs)
    return {"median": statistics.median(times_s), "best": min(times_s), "last": times_s[-1]}[which]


def _noise(runs: Sequence[Past], which: str) -> float | None:
    """How much above the chosen time another run may be by chance, as a fraction of it."""
    times_s = _times_s(runs)
    if len(times_s) < LEAST:
        return None
    quantile = T_995[min(len(times_s) - LEAST, len(T_995) - 1)]
    highest = statistics.fmean(times_s) + quantile * statistics.stdev(times_s) * math.sqrt(1 + 1 / len(times_s))
    return max(highest / _chosen(runs, which) - 1, 0.0)


def _times_s(runs: Sequence[Past]) -> list[float]:
    return [run.step_time_s for run in runs if run.step_time_s]
