"""A training that also writes the logits of the model that it trained: trained_logits.py PLAN.json finetune.

In: LOGITS, a file. Out: an array [tokens, vocabulary] in it. The model runs forward as Megatron runs it, over tensor- and
pipeline-parallel ranks, on the tokens of `tokens`.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
TOKENS = 48


def tokens(vocabulary: int) -> Any:
    """The same token ids each time, [1, tokens]."""
    import torch

    return torch.randint(2, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(5))


def observe(recipe: Any, plan: dict[str, Any], _off: dict[str, str]) -> None:
    """In place of the optimizations, which a CPU does not have."""
    import nemo_run as run
    import torch
    from lightning.pytorch.callbacks import Callback

    class Logits(Callback):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, _module: Any) -> None:
            write(trainer.strategy.megatron_parallel, plan["model"]["vocab_size"])
            trainer.strategy.barrier()

    if plan["parallelism"]["pipeline_model_parallel_size"] > 1:
        recipe.trainer.strategy.pipeline_dtype = torch.float32
    recipe.trainer.callbacks = [*recipe.trainer.callbacks, run.Config(Logits)]


def write(stages: Any, vocabulary: int) -> None:
    """One sequence through the model of all ranks; the rank that has the logits writes them."""
    import numpy as np
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)[None, None]

    def forward(_data: Any, module: Any) -> Any:
        positions = torch.arange(TOKENS)[None]
        output = module(input_ids=tokens(vocabulary), position_ids=positions, attention_mask=mask)
        return output, partial(lambda value, **_: (value.sum(), {"logits": value}))

    for stage in stages:
        stage.eval()
    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter([None]), model=list(stages), num_microbatches=1,
            seq_length=TOKENS, micro_batch_size=1, forward_only=True,
        )  # fmt: skip
        if parallel_state.is_pipeline_last_stage():
            logits = gather_from_tensor_model_parallel_region(found[0]["logits"])[0, :, :vocabulary]
            if parallel_state.get_tensor_model_parallel_rank() == 0:
                np.save(os.environ["LOGITS"], logits.float().numpy())


def observe_bridge(recipe: Any, plan: dict[str, Any], _off: dict[str, str]) -> None:
    """The same for Megatron-Bridge."""
    import torch
    from megatron.bridge.training.callbacks import Callback

    from runtime.engines.megatron_bridge import profiling

    class Logits(Callback):  # type: ignore[misc]
        def on_train_end(self, context: Any) -> None:
            write(context.model, plan["model"]["vocab_size"])

    if plan["parallelism"]["pipeline_model_parallel_size"] > 1:
        recipe.config.model.pipeline_dtype = torch.float32
    profiling.callbacks = lambda _plan: [Logits()]


def main() -> int:
    plan = json.loads(Path(sys.argv[1]).read_text())
    if plan["engine"] == "megatron_bridge":
        from runtime.engines.megatron_bridge import train as bridge
        from runtime.engines.megatron_bridge.optimizations import switch

        switch.apply = observe_bridge
        return bridge.train(plan)
    from runtime.engines.nemo import train

    train.switch.apply = observe
    return train.train(plan)


if __name__ == "__main__":
    sys.exit(main())
