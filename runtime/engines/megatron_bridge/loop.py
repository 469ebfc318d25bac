"""Save and validate in the training loop of Megatron-Bridge.

In: what is saved (`Saves`), a checkpoint to go on from, a plan with `validation`. Out: callbacks for `finetune`, and its
loop changed for this process.

After each step, the loop of Megatron-Bridge 0.6.2 writes the step line, validates, and calls `checkpoint_and_decide_exit`,
which saves. Here, `Saving` decides instead, so both engines save, stop and resume in the same way.

This module imports Megatron-Bridge, so only a training imports it.
"""

import logging
import os
import time
from pathlib import Path
from typing import Any

from megatron.bridge.training import pretrain
from megatron.bridge.training import train as loop
from megatron.bridge.training.callbacks import Callback

from runtime.engines import needs, no_gpu
from runtime.engines.megatron_bridge.recipe import Recipe
from runtime.engines.saving import Saves, Saving
from runtime.job.errors import JobError
from runtime.job.progress import say

Plan = dict[str, Any]
LOSS = "lm loss"


def resume(recipe: Recipe, checkpoint: Path) -> None:
    """Make the recipe go on from a checkpoint. With LoRA, the base weights still come from the converted checkpoint."""
    recipe.config.checkpoint.load = str(checkpoint / "weights")


class Save(Callback):  # type: ignore[misc]
    """Calls `Saving` when a step begins and ends."""

    def __init__(self, saves: Saves) -> None:
        """JobError: the loop of this version is another one, and would not call `_after_step`."""
        require(
            "train:checkpoint_and_decide_exit(train_data_iterator)", "train:save_checkpoint_and_time(train_data_iterator)"
        )
        self.saving = Saving(saves)
        loop.checkpoint_and_decide_exit = self._after_step
        # It would write the traceback of each error. One with a message for the user needs none.
        logging.getLogger(pretrain.__name__).addFilter(lambda record: not _is_job_error(record))

    def on_train_start(self, _context: Any) -> None:
        """Before the first step."""
        self.saving.begin()

    def on_train_step_start(self, context: Any) -> None:
        """Before a step."""
        self.saving.before_step(context.state.train_state.step)

    def _after_step(self, state: Any, *others: Any, **named: Any) -> bool:
        """Save, if it is time to. In place of Megatron-Bridge's own function; False: the loop goes on.

        To stop, the run gets this step as its last one: if an error ended the loop, all ranks would print tracebacks.
        """
        step, checkpoint = state.train_state.step, state.cfg.checkpoint
        *to_save, data = others  # Megatron-Bridge hands on the iterator of the data last, and by position

        def write(folder: Path) -> None:
            checkpoint.save = str(folder / "weights")
            try:
                loop.save_checkpoint_and_time(state, *to_save, train_data_iterator=data, **named)
            finally:
                checkpoint.save = None

        if self.saving.after_step(step):
            self.saving.save(step, write)
        if self.saving.stopping:
            state.cfg.train.train_iters = step
            pretrain.barrier_and_log = no_gpu.nothing  # it would say that the training is done
        return False


def validate(recipe: Recipe, plan: Plan, sequences: int) -> Callback:
    """Validate every N steps and after the last one, on `sequences` held-out sequences. The callback writes the losses.

    Training is the same with and without it: no random number and no training sample is used up. What does not fill a global
    batch is left out. JobError: this version validates in another way.
    """
    require("pretrain:evaluate_and_print_results(data_iterator)", "train:evaluate_and_print_results(data_iterator)")
    config, batches = recipe.config, sequences // plan["global_batch_size"]
    config.validation.eval_iters = batches
    config.validation.eval_interval = plan["validation"]["every_steps"]
    config.dataset.do_validation = True
    pretrain.evaluate_and_print_results = no_gpu.nothing  # the loop validates the last step too
    return Validate(plan["max_steps"], batches * plan["global_batch_size"])


class Validate(Callback):  # type: ignore[misc]
    """Has the last step validated, and writes a line for each validation."""

    def __init__(self, last_step: int, sequences: int) -> None:
        self.last_step, self.sequences = last_step, sequences
        self.began = 0.0

    def on_train_step_start(self, context: Any) -> None:
        """The loop validates if the number of a step is a multiple of the interval."""
        if context.state.train_state.step + 1 == self.last_step:
            context.state.cfg.validation.eval_interval = self.last_step

    def on_eval_start(self, _context: Any) -> None:
        """Note the time."""
        self.began = time.monotonic()

    def on_eval_end(self, context: Any) -> None:
        """Write the loss, with all its digits. The last rank has it, as it has that of the step lines."""
        if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            loss, took_s = float(context.total_loss_dict[LOSS]), time.monotonic() - self.began
            step = context.state.train_state.step
            what = f"validation after step {step}: loss {loss:.7g} over {self.sequences} sequences in {took_s:.2f} s"
            say(what, any_rank=True)


def require(*names: str) -> None:
    """JobError if this Megatron-Bridge lacks one of these names of its `training`, which ftgen replaces or calls."""
    if lacking := needs.missing(*(f"megatron.bridge.training.{name}" for name in names)):
        raise JobError(f"this Megatron-Bridge cannot be used for this run: {lacking}", "use Megatron-Bridge 0.6.2")


def _is_job_error(record: logging.LogRecord) -> bool:
    return bool(record.exc_info and isinstance(record.exc_info[1], JobError))
