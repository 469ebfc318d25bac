"""How much of a run's time was useful. In: a `Log`. Out: a `Goodput`.

Useful is the time of the steps that count in the end. Each step counts once. Saves and validations stand between steps and
are not useful time. The whole time is that of all attempts, from the first to the last time that each has written into its
log: with the start of the job, NeMo's imports, and steps that were lost; without the time in the queue. A job that is killed
at once has written the time at most half a minute before.
"""

from typing import NamedTuple

from ftgen.logs.log import Log


class Goodput(NamedTuple):
    """The shares of a run's time. None and empty: the run is not saved."""

    total_time_s: float | None = None  # of all attempts
    goodput: float | None = None  # useful time by the whole time, a fraction
    saves: int | None = None
    save_time_s: float | None = None
    save_share: float | None = None  # time of the saves by the whole time, a fraction
    attempts: tuple[str, ...] = ()


def goodput(log: Log) -> Goodput:
    """The shares, as far as the log has the times of its attempts."""
    history = log.history
    if not history.attempts:
        return Goodput()
    total_s = sum((each.ended - each.began).total_seconds() for each in history.attempts)
    useful_s = _useful(log)
    saved_s = sum(seconds for _, seconds in history.saves)
    return Goodput(
        total_time_s=total_s,
        goodput=sum(useful_s) / total_s if total_s else None,
        saves=len(history.saves),
        save_time_s=saved_s,
        save_share=saved_s / total_s if total_s else None,
        attempts=tuple(_describe(log, number, useful_s[number]) for number in range(len(history.attempts))),
    )


def _ranges(log: Log) -> list[range]:
    """For each attempt, the steps (from 0) that it contributed: those that no later attempt made again."""
    starts = [each.resumed for each in log.history.attempts]
    ends = [min(starts[number + 1 :], default=log.steps.last + 1) for number in range(len(starts))]
    return [range(start, max(start, end)) for start, end in zip(starts, ends, strict=True)]


def _useful(log: Log) -> list[float]:
    """For each attempt, the seconds of the steps that it contributed."""
    useful = [0.0] * len(log.history.attempts)
    ranges = _ranges(log)
    for number, time_s, _ in log.steps.curve():
        for attempt, steps in enumerate(ranges):
            if number in steps:
                useful[attempt] += time_s or 0.0
    return useful


def _describe(log: Log, number: int, useful_s: float) -> str:
    """`attempt 2: steps 26 to 99, 48% of 51 s useful`."""
    attempt, steps = log.history.attempts[number], _ranges(log)[number]
    took_s = (attempt.ended - attempt.began).total_seconds()
    made = f"steps {steps.start} to {steps.stop - 1}" if steps else "no step that counts"
    share = f"{useful_s / took_s:.0%} of {took_s:.0f} s useful" if took_s else "less than a second"
    return f"attempt {number + 1}: {made}, {share}"
