"""Train: one process per rank.

In: a plan, and the rank of this process in the environment. Out: Megatron-Bridge's own step lines on stdout.

Environment: RANK, LOCAL_RANK, WORLD_SIZE, NODE_RANK, MASTER_ADDR, MASTER_PORT (defaults for a single process: see
runtime/job/ranks.py).
"""

import warnings
from typing import Any

from runtime.data import report
from runtime.data.prepare import prepare
from runtime.engines import attempt
from runtime.engines.megatron_bridge import compatibility
from runtime.job import environment, profile, ranks, stop
from runtime.job.errors import JobError
from runtime.job.progress import say, timed
from runtime.node import beside, telemetry
from runtime.weights import checkpoint, read_ahead

Plan = dict[str, Any]


def train(plan: Plan) -> int:
    """Train the plan's steps or epochs; exit code 0, or 85 if it was asked to stop and is to be run again.

    JobError: no checkpoint, no GPU, a wrong WORLD_SIZE, faulty data.
    """
    ranks.set_defaults(plan)
    profile.enter(plan)
    weights = checkpoint.directory(plan)
    if not checkpoint.converted(plan):
        raise JobError(f"there is no converted checkpoint in {weights}", "run the command convert first")
    this = attempt.begin(plan) if plan.get("save") else None
    if this and this.step == attempt.steps(plan):
        say("the run is complete: its last step is saved")
        return 0
    telemetry.begin(plan)
    read_ahead.begin(weights / "weights" / "iter_0000000")
    with beside.checked(plan), timed("importing Megatron-Bridge"):
        compatibility.before_imports(plan)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="megatron")
        import torch
        from megatron.bridge.training.finetune import finetune

        from runtime.engines.megatron_bridge import callbacks, packing, recipe, steps
        from runtime.engines.megatron_bridge.optimizations import switch

        compatibility.after_imports()
    if plan["gpu"]["name"] == "cpu":
        from runtime.engines.megatron_bridge import cpu

        cpu.stand_in()
    elif not torch.cuda.is_available():
        raise JobError("PyTorch finds no GPU in this process", 'see nvidia-smi; gpu = "cpu" in the spec needs no GPU')
    files = prepare(plan, weights / "context", packing)
    plan = report.planned(plan, files.tokens)
    recipe_of_run = recipe.build(plan, weights, files)
    off = switch.unavailable(recipe_of_run, plan)
    environment.tell(plan, off)
    switch.apply(recipe_of_run, plan, off)
    own = callbacks.of_run(recipe_of_run, plan, files, this)
    say(f"training: {plan['experiment']}, {plan['max_steps']} steps")
    finetune(recipe_of_run.config, steps.forward_step_of(recipe_of_run), callbacks=own)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return stop.AGAIN if callbacks.stopped(own) else 0
