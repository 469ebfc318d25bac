"""A training that records what it trains on, and that sends itself a signal at a given moment.

    recorder.py PLAN.json finetune         with a plan
    recorder.py ENTRYPOINT.py COMMAND      with a generated entrypoint, in place of the job's Python

Each rank writes a line of JSON for each step (loss, norm of the gradients, learning rate, a hash of the batch, all exact)
and for each validation into $FTGEN_RUN_DIR/record.<rank>. Environment:

MOMENT        "<what>:<step>:<signal>:<rank>", when a rank sends itself a signal. What:
              step     when the step has ended, before its save
              weights  when the weights of the step are written, and their index is not (rank 0)
              rename   when the checkpoint of the step is complete, but for its name (rank 0)
              saved    when the checkpoint of the step has its name (rank 0)
              Several moments, one for each attempt of a requeued job, are separated by spaces.
STEP_S        seconds that each step takes longer
WORKERS       number of processes that load data; default: the recipe's, on a CPU none
LOCK          file that the process locks while it trains
"""

import fcntl
import hashlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

if sys.argv[1:] and sys.argv[1].endswith(".json"):
    sys.path.insert(0, str(Path(__file__).parents[2]))

MOMENTS = os.environ.get("MOMENT", "").split()
ATTEMPT = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
KEYS = ("tokens", "labels", "loss_mask", "position_ids")
batches: list[str] = []  # hashes, since the last line


def now(what: str, step: int) -> None:
    """Send the signal if this is the moment."""
    for moment in MOMENTS[ATTEMPT : ATTEMPT + 1]:
        wanted, at, name, rank = moment.split(":")
        if (what, step, os.environ["RANK"]) == (wanted, int(at), rank):
            print(f"recorder: {what} of step {step}: SIG{name} to rank {rank}", flush=True)
            number = getattr(signal, f"SIG{name}")
            if os.getpgrp() == os.getpid():  # as Slurm does: to every process of the task
                os.killpg(os.getpid(), number)
            else:
                os.kill(os.getpid(), number)


def write(**line: object) -> None:
    with Path(os.environ["FTGEN_RUN_DIR"], f"record.{os.environ['RANK']}").open("a") as file:
        file.write(json.dumps(line) + "\n")


def hashed(data_step):
    def step(model, iterator):
        batch = data_step(model, iterator)
        digest = hashlib.sha256()
        for key in KEYS:
            digest.update(batch[key].float().cpu().numpy().tobytes())
        batches.append(digest.hexdigest()[:12])
        return without_packs(batch) if "cu_seqlens" in batch and batch["tokens"].device.type == "cpu" else batch

    return step


def without_packs(batch):
    """Megatron's own layers, which a CPU needs, do not know packed sequences: a pack becomes one long example."""
    import torch

    length = batch["tokens"].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    kept = {key: value for key, value in batch.items() if not key.startswith(("cu_seqlens", "max_seqlen"))}
    return kept | {"attention_mask": mask}


def observe(recipe, plan, off, optimize) -> None:
    """Add the recorder to the recipe, after the plan's optimizations."""
    import nemo_run as run
    from lightning.pytorch.callbacks import Callback
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from nemo.collections.llm.gpt.model.base import GPTModel

    from runtime.guard import checkpoints

    optimize(recipe, plan, off)

    class Recorder(Callback):
        step = 0

        def on_train_start(self, *_):
            if "LOCK" in os.environ:  # one training at a time, whatever else starts beside it
                self.lock = os.open(os.environ["LOCK"], os.O_WRONLY | os.O_CREAT)
                fcntl.flock(self.lock, fcntl.LOCK_EX)

        def on_train_batch_end(self, trainer, *_):
            Recorder.step = trainer.global_step
            loss, rate = float(trainer.callback_metrics["reduced_train_loss"]), trainer.optimizers[0].param_groups[0]["lr"]
            norm = trainer.callback_metrics.get("grad_norm")
            norm = norm if norm is None else float(norm)
            write(step=trainer.global_step, loss=loss, norm=norm, rate=rate, batch=" ".join(batches))
            batches.clear()
            time.sleep(float(os.environ.get("STEP_S", "0")))
            now("step", trainer.global_step)

        def on_validation_end(self, trainer, *_):
            write(validated=trainer.global_step, loss=float(trainer.callback_metrics["val_loss"]), batch=" ".join(batches))
            batches.clear()

    GPTModel.data_step = hashed(GPTModel.data_step)
    recipe.trainer.callbacks = [*recipe.trainer.callbacks, run.Config(Recorder)]
    if "WORKERS" in os.environ:
        recipe.data.num_workers = int(os.environ["WORKERS"])

    def before(owner, name, what):
        real = getattr(owner, name)

        def first(*arguments, **named):
            now(what, Recorder.step)
            return real(*arguments, **named)

        setattr(owner, name, first)

    before(filesystem_async.FileSystemWriterAsync, "finish", "weights")
    before(checkpoints, "highest", "rename")  # the last look before it
    before(checkpoints, "keep_newest", "saved")


def main() -> int:
    program, command = sys.argv[1:]
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))  # the job's own runtime
    if command == "finetune":
        from runtime.engines.nemo import train

        optimize = train.switch.apply
        train.switch.apply = lambda recipe, plan, off: observe(recipe, plan, off, optimize)
    if program.endswith(".py"):
        sys.argv = sys.argv[1:]
        runpy.run_path(program, run_name="__main__")
    return run(train, json.loads(Path(program).read_text()))


def run(train, plan) -> int:
    """Train with an engine's module `train`."""
    from runtime.job.errors import JobError

    try:
        return train.train(plan)
    except JobError as error:
        print(f"ftgen: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
