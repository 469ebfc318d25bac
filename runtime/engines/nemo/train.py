"""Train: one process per rank.

In: a plan, and the rank of this process in the environment. Out: NeMo's own step lines on stdout.

Environment: RANK, LOCAL_RANK, WORLD_SIZE, NODE_RANK, MASTER_ADDR, MASTER_PORT (defaults for a single process: 0, 0,
1, 0, this machine, a free port); FTGEN_RUN_DIR, where NeMo writes (default $STAGE_PATH/logs).
"""

import os
from typing import Any

from runtime.data import report
from runtime.data.prepare import prepare
from runtime.engines import attempt
from runtime.engines.nemo import compatibility, convert, imports, trackers
from runtime.engines.nemo.optimizations import switch
from runtime.engines.trackers import asked
from runtime.job import environment, profile, ranks
from runtime.job.errors import JobError
from runtime.job.places import run_directory
from runtime.job.progress import say, timed
from runtime.node import beside, telemetry
from runtime.weights import read_ahead

Plan = dict[str, Any]


def train(plan: Plan) -> int:
    """Train the plan's steps or epochs; exit code 0. JobError: no checkpoint, no GPU, a wrong WORLD_SIZE, faulty data."""
    ranks.set_defaults(plan)
    profile.enter(plan)
    weights = convert.directory(plan)
    if not convert.converted(plan):
        raise JobError(f"there is no converted checkpoint in {weights}", "run the command convert first")
    this = attempt.begin(plan) if plan.get("save") else None
    if this and this.step == attempt.steps(plan):
        say("the run is complete: its last step is saved")
        return 0
    telemetry.begin(plan)
    read_ahead.begin(weights / "weights")
    with beside.checked(plan), timed("importing NeMo"):
        _set_variables(plan)
        switch.before_imports(plan)
        trackers.before_imports(plan)
        imports.defer()
        import fiddle
        import torch

        from runtime.engines.nemo import profiling, recipe, step_ends, validate

        compatibility.after_imports()
    if plan["gpu"]["name"] == "cpu":
        from runtime.engines.nemo import cpu

        cpu.stand_in()
    elif not torch.cuda.is_available():
        raise JobError("PyTorch finds no GPU in this process", 'see nvidia-smi; gpu = "cpu" in the spec needs no GPU')
    off = switch.unavailable(recipe.stock(plan, run_directory()), plan)
    environment.tell(plan, off)
    files = prepare(plan, weights / "context" / "nemo_tokenizer")
    plan = report.planned(plan, files.tokens)
    recipe_of_run = recipe.build(plan, weights, files, run_directory())
    switch.apply(recipe_of_run, plan, off)
    profiling.add(recipe_of_run, plan)
    step_ends.add(recipe_of_run)
    if asked(plan):
        trackers.add(recipe_of_run, plan, run_directory(), this.step if this else 0)
    if plan.get("validation"):
        validate.add(recipe_of_run, plan)
    if this:
        from runtime.engines.nemo import resume, save  # NeMo before 2.6 lacks what they import

        saves = attempt.saves(plan, this, files)
        resume.prepare(recipe_of_run, plan)
        if this.checkpoint:
            resume.resume(recipe_of_run, this.checkpoint.path)
        save.add(recipe_of_run, saves)
    training = fiddle.build(recipe_of_run)
    say(f"training: {plan['experiment']}, {plan['max_steps']} steps")
    training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _set_variables(plan: Plan) -> None:
    """Set the variables that NeMo and Lightning read when they are imported or built."""
    os.environ["PL_GLOBAL_SEED"] = str(plan["seed"])
    if plan["gpu"]["name"] != "cpu":
        os.environ.setdefault("NEMO_LOG_MEMORY_USAGE", "1")
