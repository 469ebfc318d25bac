"""Trains as a job does, saves a distributed checkpoint with NeMo, and writes the logits of the trained model itself.

train_and_save.py PLAN.json FOLDER: FOLDER/weights, FOLDER/logits.npy [tokens, vocabulary] and FOLDER/tokens.json.
"""

import json
import os
import queue
import sys
from functools import partial
from pathlib import Path
from typing import Any

TOKENS = 48


def main(plan: dict[str, Any], folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from runtime.data.prepare import prepare
    from runtime.engines.nemo import convert, cpu, imports, recipe, train

    train._set_ranks(plan)
    train._set_variables(plan)
    imports.defer()
    import fiddle
    import torch

    torch.set_num_threads(1)
    cpu.stand_in()
    make_saving_work_here()
    weights = convert.directory(plan)
    files = prepare(plan, weights / "context" / "nemo_tokenizer")
    made = recipe.build(plan, weights, files, folder / "logs")
    made.trainer.strategy.ckpt_async_save = False
    if plan["parallelism"]["pipeline_model_parallel_size"] > 1:
        made.trainer.strategy.pipeline_dtype = torch.float32
    made.trainer.callbacks = [*made.trainer.callbacks, saving_callback(folder, plan["model"]["vocab_size"])]
    fiddle.build(made)()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def make_saving_work_here() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter

    filesystem_async._results_queue = queue.Queue()
    # Rank 0 alone gathers Megatron's timers from all ranks: with gloo, the next barrier would hang.
    ProgressPrinter.log_megatron_timers = lambda *_args, **_kwargs: None


def saving_callback(folder: Path, vocabulary: int) -> Any:
    import nemo_run as run
    from lightning.pytorch.callbacks import Callback
    from nemo.lightning.io.mixin import IOMixin

    class Save(Callback, IOMixin):
        def __init__(self, folder: str, vocabulary: int) -> None:
            self.folder, self.vocabulary = Path(folder), vocabulary

        def on_train_end(self, trainer: Any, _module: Any) -> None:
            trainer.save_checkpoint(self.folder)
            write_logits(trainer.strategy.megatron_parallel, self.folder, self.vocabulary)
            trainer.strategy.barrier()

    return run.Config(Save, folder=str(folder), vocabulary=vocabulary)


def write_logits(stages: Any, folder: Path, vocabulary: int) -> None:
    """Run the trained model forward as Megatron does, over tensor- and pipeline-parallel ranks."""
    import numpy as np
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    tokens = torch.randint(2, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(TOKENS)[None]
    mask = (torch.tril(torch.ones(TOKENS, TOKENS)) < 0.5)[None, None]

    def forward(_data: Any, module: Any) -> Any:
        output = module(input_ids=tokens, position_ids=positions, attention_mask=mask)
        return output, partial(lambda value, **_: (value.sum(), {"logits": value}))

    stages.eval()
    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter([None]), model=list(stages), num_microbatches=1,
            seq_length=TOKENS, micro_batch_size=1, forward_only=True,
        )  # fmt: skip
        if parallel_state.is_pipeline_last_stage():
            logits = gather_from_tensor_model_parallel_region(found[0]["logits"])[0, :, :vocabulary]
            if parallel_state.get_tensor_model_parallel_rank() == 0:
                np.save(folder / "logits.npy", logits.float().numpy())
                (folder / "tokens.json").write_text(json.dumps(tokens[0].tolist()))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
