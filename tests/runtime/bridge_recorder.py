"""As recorder.py, for a training with Megatron-Bridge: bridge_recorder.py PLAN.json finetune.

The same lines in the same files, and the same environment.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from recorder import KEYS, batches, now, run, write

DATA_WORKERS = "WORKERS"


def observe(recipe, plan, off, optimize) -> None:
    """Add the recorder to the recipe, after the plan's optimizations."""
    from megatron.bridge.training.callbacks import Callback
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from runtime.engines.megatron_bridge import profiling
    from runtime.guard import checkpoints

    optimize(recipe, plan, off)

    class Recorder(Callback):
        step = 0
        rate = 0.0

        def on_train_step_start(self, context):
            Recorder.rate = context.optimizer.param_groups[0]["lr"]

        def on_train_step_end(self, context):
            Recorder.step = context.state.train_state.step + 1  # it is counted after this callback
            loss = float(context.loss_dict["lm loss"])
            write(step=Recorder.step, loss=loss, rate=Recorder.rate, batch=" ".join(batches))
            batches.clear()
            time.sleep(float(os.environ.get("STEP_S", "0")))
            now("step", Recorder.step)

        def on_eval_end(self, context):
            loss = float(context.total_loss_dict["lm loss"])
            write(validated=context.state.train_state.step, loss=loss, batch=" ".join(batches))
            batches.clear()

    def hashed(_model, batch):
        digest = hashlib.sha256()
        for key in KEYS:
            digest.update(batch[key].float().cpu().numpy().tobytes())
        batches.append(digest.hexdigest()[:12])
        return batch

    def before(owner, name, what):
        real = getattr(owner, name)

        def first(*arguments, **named):
            now(what, Recorder.step)
            return real(*arguments, **named)

        setattr(owner, name, first)

    recipe.changes.append(hashed)
    profiling.callbacks = lambda _plan: [Recorder()]
    if DATA_WORKERS in os.environ:
        recipe.config.dataset.num_workers = int(os.environ[DATA_WORKERS])
    before(filesystem_async.FileSystemWriterAsync, "finish", "weights")
    before(checkpoints, "highest", "rename")  # the last look before it
    before(checkpoints, "keep_newest", "saved")


def main() -> int:
    from runtime.engines.megatron_bridge import train
    from runtime.engines.megatron_bridge.optimizations import switch

    optimize = switch.apply
    switch.apply = lambda recipe, plan, off: observe(recipe, plan, off, optimize)
    return run(train, json.loads(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    sys.exit(main())
