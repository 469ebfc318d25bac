"""A training that records what it trains on, and that kills itself at a given moment: recorder.py PLAN.json finetune.

Each rank writes a line of JSON for each step (loss, learning rate, a hash of the batch, all exact) and for each validation
into $RECORD. Environment:

RECORD        file that the lines are appended to; ".<rank>" is added
MOMENT        "<what>:<step>", when this rank sends itself a signal:
              step     when the step has ended, before its save
              weights  when the weights of the step are written, and their index is not
              rename   when the checkpoint of the step is complete, but for its name
              saved    when the checkpoint of the step has its name
SIGNAL        the signal; default: KILL
WORKERS       number of processes that load data; default: none
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

WHAT, _, STEP = os.environ.get("MOMENT", "never:0").partition(":")
KEYS = ("tokens", "labels", "loss_mask", "position_ids")
batches: list[str] = []  # hashes, since the last line


def now(what: str, step: int) -> None:
    if (what, step) == (WHAT, int(STEP)):
        print(f"recorder: {what} of step {step}: signal {os.environ.get('SIGNAL', 'KILL')}", flush=True)
        os.kill(os.getpid(), getattr(signal, f"SIG{os.environ.get('SIGNAL', 'KILL')}"))


def write(**line: object) -> None:
    with Path(f"{os.environ['RECORD']}.{os.environ['RANK']}").open("a") as file:
        file.write(json.dumps(line) + "\n")


def hashed(data_step):
    def step(model, iterator):
        batch = data_step(model, iterator)
        digest = hashlib.sha256()
        for key in KEYS:
            digest.update(batch[key].float().numpy().tobytes())
        batches.append(digest.hexdigest()[:12])
        return batch if "cu_seqlens" not in batch else without_packs(batch)

    return step


def without_packs(batch):
    """Megatron's own layers, which a CPU needs, do not know packed sequences: a pack becomes one long example."""
    import torch

    length = batch["tokens"].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    kept = {key: value for key, value in batch.items() if not key.startswith(("cu_seqlens", "max_seqlen"))}
    return kept | {"attention_mask": mask}


def observe(recipe, _plan) -> None:
    """In place of the optimizations, which a CPU does not have."""
    import nemo_run as run
    from lightning.pytorch.callbacks import Callback
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from nemo.collections.llm.gpt.model.base import GPTModel

    from runtime.guard import checkpoints

    class Recorder(Callback):
        step = 0

        def on_train_batch_end(self, trainer, *_):
            Recorder.step = trainer.global_step
            loss, rate = float(trainer.callback_metrics["reduced_train_loss"]), trainer.optimizers[0].param_groups[0]["lr"]
            write(step=trainer.global_step, loss=loss, rate=rate, batch=" ".join(batches))
            batches.clear()
            now("step", trainer.global_step)

        def on_validation_end(self, trainer, *_):
            write(validated=trainer.global_step, loss=float(trainer.callback_metrics["val_loss"]), batch=" ".join(batches))
            batches.clear()

    GPTModel.data_step = hashed(GPTModel.data_step)
    recipe.trainer.callbacks = [*recipe.trainer.callbacks, run.Config(Recorder)]
    recipe.data.num_workers = int(os.environ.get("WORKERS", "0"))

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
    from runtime.engines.nemo import train
    from runtime.job.errors import JobError

    train.switch.apply = observe
    try:
        return train.train(json.loads(Path(sys.argv[1]).read_text()))
    except JobError as error:
        print(f"ftgen: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
