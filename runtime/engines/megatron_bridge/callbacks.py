"""Collect the callbacks of a run: they profile, measure, validate, track and save it.

In: a recipe, a plan, its data, and the attempt if the run is saved. Out: callbacks for `finetune`, in their order.

This module imports Megatron-Bridge, so only a training imports it.
"""

from typing import Any

from runtime.data import held_out
from runtime.data.prepare import Files
from runtime.engines import attempt
from runtime.engines.attempt import Attempt
from runtime.engines.megatron_bridge import loop, profiling, step_ends, trackers
from runtime.engines.megatron_bridge.recipe import Recipe
from runtime.engines.trackers import asked
from runtime.job.places import run_directory

Plan = dict[str, Any]


def of_run(recipe: Recipe, plan: Plan, files: Files, this: Attempt | None) -> list[Any]:
    """The callbacks. With an attempt, the recipe goes on from its checkpoint. JobError: the data has changed since then."""
    first = this.step if this else 0
    found = [*profiling.callbacks(plan), *step_ends.callbacks(first)]
    if plan.get("validation"):
        found.append(loop.validate(recipe, plan, held_out.sequences(plan, *files)[0]))
    if asked(plan):
        found.append(trackers.Track(plan, run_directory(), first))
    if this:
        found.append(loop.Save(attempt.saves(plan, this, files)))
        if this.checkpoint:
            loop.resume(recipe, this.checkpoint.path)
    return found


def stopped(callbacks: list[Any]) -> bool:
    """Whether the run was saved before its last step, because it was asked to stop."""
    return any(isinstance(each, loop.Save) and each.saving.stopping for each in callbacks)
