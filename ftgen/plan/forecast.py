"""Forecasts the step time of a plan from measured runs of the same kind, and with it hours, energy and cost.

In: a `Plan` and `Measured` rows. Out: a `Forecast`, or the reason why there is none, and rows of text. Pure.

The error is the largest of held-out forecasts: each row forecast from the others, in the same way as the plan.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import NamedTuple

from ftgen.catalogue.measurements import HISTORY, PUBLISHED, Measured, of_plan
from ftgen.plan.nearest import Guess, error_of, held_out, kind, nearest, recipe
from ftgen.plan.plan import Plan
from ftgen.units import number, significant

SECONDS_PER_HOUR = 3600
LEAST = 2  # held-out forecasts that tell of an error
NEWEST = 50  # runs of a history that count


class Error(NamedTuple):
    """How far a forecast may be from the step time."""

    share: float  # a fraction of it
    trials: int  # held-out forecasts that tell
    of_kind: bool  # whether one of them is of the plan's kind

    def __str__(self) -> str:
        """In words."""
        of = "" if self.of_kind else " of other work"
        return f"± {self.share:.0%}, the largest error of {self.trials} held-out forecasts{of}"


class Forecast(NamedTuple):
    """What a plan will take. None: not known."""

    guess: Guess
    error: Error | None
    hours: float | None  # of all steps
    gpu_hours: float | None
    power_w: float | None  # of a GPU
    kwh: float | None
    cost: float | None


def work_of(plan: Plan) -> Measured:
    """The plan as a row whose step time nobody knows."""
    keys = ("scheme", "precision", "gpus", "global_batch_size", "seq_length")
    return Measured(
        model=plan.model.name,
        gpu=plan.gpu.name,
        step_time_s=math.nan,
        source="",
        **{key: getattr(plan, key) for key in keys},
        **of_plan(asdict(plan)),
    )


def forecast(plan: Plan, rows: Sequence[Measured]) -> Forecast | str:
    """The forecast; a text that says why there is none."""
    work = work_of(plan)
    history = [row for row in rows if row.origin == HISTORY and kind(row) == kind(work)]
    rows = [*history[-NEWEST:], *(row for row in rows if row.origin != HISTORY)]
    guess = nearest(work, rows)
    if isinstance(guess, str):
        return guess
    hours = plan.max_steps * guess.step_time_s / SECONDS_PER_HOUR if plan.max_steps else None
    gpu_hours = hours * plan.gpus if hours else None
    power_w = _power(work, guess, rows)
    return Forecast(
        guess,
        _error(guess, work, rows),
        hours,
        gpu_hours,
        power_w,
        kwh=gpu_hours * power_w / 1000 if gpu_hours and power_w else None,
        cost=gpu_hours * plan.price.per_gpu_hour if gpu_hours and plan.price else None,
    )


def _error(guess: Guess, work: Measured, rows: Sequence[Measured]) -> Error | None:
    """The largest error of held-out forecasts that were made in the same way, or in one that differs from its row in more.

    Those of the same scheme, precision and recipe come first, then those of other work, stock or not as the plan. A longer
    way from one number of GPUs to another has a larger error, in proportion. None: there are too few.
    """
    covering = [(row, each) for row, each in held_out(rows) if each.way.covers(guess.way)]
    exact = [(row, each) for row, each in covering if each.way == guess.way]
    for same in (recipe, lambda row: bool(row.optimizations)):
        for some in (exact, covering):
            alike = [(row, each) for row, each in some if same(row) == same(work)]
            if len(alike) >= LEAST:
                largest = max(abs(error_of(row, each)) for row, each in alike)
                tried = max(each.doublings for _, each in alike)
                farther = max(1.0, guess.doublings / tried if tried else 1.0)
                return Error(largest * farther, len(alike), any(kind(row) == kind(work) for row, _ in alike))
    return None


def _power(work: Measured, guess: Guess, rows: Iterable[Measured]) -> float | None:
    """The median power of the rows that the forecast rests on, or else of all with the same kind and recipe."""
    of_guess = [row.power_w for row in guess.rows if row.power_w]
    alike = [row.power_w for row in rows if row.power_w and (kind(row), recipe(row)) == (kind(work), recipe(work))]
    known = of_guess or alike
    return median(known) if known else None


def describe(plan: Plan, found: Forecast | str) -> list[tuple[str, str]]:
    """The forecast in words: (label, text)."""
    if isinstance(found, str):
        return [("", f"none: {found}")]
    guess = found.guess
    error = str(found.error or "error not known: there is no run to try it on")
    return [
        ("step time", f"{significant(guess.step_time_s, 3)} s, {error}"),
        (f"{plan.max_steps or 'all'} steps", _took(plan, found)),
        ("rests on", "; ".join(_basis(plan, guess))),
    ]


def _took(plan: Plan, found: Forecast) -> str:
    if found.hours is None or found.gpu_hours is None:
        return "the data decides how many there are"
    parts = [_time(found.hours * SECONDS_PER_HOUR), f"{significant(found.gpu_hours, 3)} GPU-hours"]
    if found.kwh is None or found.power_w is None:
        parts.append("energy not known: no measured power")
    else:
        parts.append(f"{significant(found.kwh, 3)} kWh at {number(found.power_w, 0)} W for each GPU")
    if plan.price and found.cost is not None:
        parts.append(f"{found.cost:.2f} {plan.price.currency}")
    return ", ".join(parts)


def _time(seconds: float) -> str:
    if seconds < 2 * 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 2 * SECONDS_PER_HOUR else f"{seconds / SECONDS_PER_HOUR:.1f} hours"


def _basis(plan: Plan, guess: Guess) -> list[str]:
    """The runs, and how far they are from the plan."""
    of = guess.rows[0]
    count = len(guess.rows)
    said = [f"{'published: ' if of.origin == PUBLISHED else ''}{'; '.join(dict.fromkeys(row.source for row in guess.rows))}"]
    said[0] += f" ({count} run{'s' * (count > 1)})"
    if guess.way.optimizations:
        said.append("of the stock recipe" if not of.optimizations else "with other optimizations")
    if guess.way.gpus:
        sizes = "/".join(str(gpus) for gpus in sorted({row.gpus for row in guess.rows}))
        said.append(f"scaled from {sizes} to {plan.gpus} GPUs, {guess.growth:+.1%} for each doubling")
        said += guess.beyond
    if guess.way.tokens:
        said.append("scaled by the tokens of a GPU in a step")
    return said


def explain(found: Forecast | str) -> list[tuple[str, str, str]]:
    """(key, value, origin) of each figure, for `ftgen plan --all`."""
    if isinstance(found, str):
        return [("forecast", "–", found)]
    figures = {
        "step_time_s": found.guess.step_time_s,
        "error": found.error and found.error.share,
        **{key: getattr(found, key) for key in ("hours", "gpu_hours", "power_w", "kwh", "cost")},
    }
    rests = f"forecast from {len(found.guess.rows)} runs of {found.guess.rows[0].source}: {found.guess.way}"
    return [(f"forecast.{key}", "–" if value is None else f"{value:.4g}", rests) for key, value in figures.items()]
