"""A training that also writes what a peer needs to start alike, and what it computed: peer_recorder.py PLAN.json finetune.

In: RECORD, a file. Out: an .npz in it with the exact losses and rates, the loss tokens and a hash of each micro-batch, the
number of trained weights, and the adapters before the first step by the names of Hugging Face ("0.A", "0.q", …). The
adapters' second matrices start at random instead of zero: adapters that add nothing would hide what is wrong with them.
"""

import json
import os
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
seen: dict[str, list[Any]] = {"losses": [], "rates": [], "loss_tokens": [], "batches": []}


def observe(recipe: Any, plan: dict[str, Any], _off: dict[str, str]) -> None:
    """In place of the optimizations, which a CPU does not have."""
    import nemo_run as run
    import numpy as np
    from lightning.pytorch.callbacks import Callback
    from nemo.collections.llm.gpt.model.base import GPTModel

    data_step = GPTModel.data_step

    class Record(Callback):  # type: ignore[misc]
        def on_train_batch_start(self, _trainer: Any, module: Any, *_: Any) -> None:
            if not seen["losses"]:
                trained = {name: each.detach() for name, each in module.named_parameters() if each.requires_grad}
                self.adapters = adapters(trained, plan["model"])
                self.trained = sum(each.numel() for each in trained.values())

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen["losses"].append(float(trainer.callback_metrics["reduced_train_loss"]))
            seen["rates"].append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_train_end(self, *_: Any) -> None:
            np.savez(os.environ["RECORD"], trained=self.trained, **seen, **self.adapters)

    def step(model: Any, iterator: Any) -> Any:
        batch = data_step(model, iterator)
        boundaries = batch["cu_seqlens"][0]
        boundaries = boundaries[: int(batch["cu_seqlens_argmin"][0])] if int(boundaries.min()) < 0 else boundaries
        parts = [batch["tokens"], batch["labels"], batch["loss_mask"], boundaries]
        seen["batches"].append(sha256(b"".join(part.long().numpy().tobytes() for part in parts)).hexdigest())
        seen["loss_tokens"].append(int(batch["loss_mask"].sum()))
        return batch

    GPTModel.data_step = step
    recipe.peft.lora_B_init_method = "xavier"
    recipe.trainer.callbacks = [*recipe.trainer.callbacks, run.Config(Record)]


def adapters(trained: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Megatron-Core's rows of linear_qkv are those of one group after another: its queries, its key, its value."""
    groups, size, found = model["num_query_groups"], model["head_size"], {}
    for name, weight in trained.items():
        number = name.partition("layers.")[2].partition(".")[0]
        if "linear_in" in name:
            found[f"{number}.A"] = weight.clone().numpy()
            continue
        rows = weight.view(groups, -1, size, weight.shape[-1])
        for key, part in (("q", rows[:, :-2]), ("k", rows[:, -2:-1]), ("v", rows[:, -1:])):
            found[f"{number}.{key}"] = part.reshape(-1, weight.shape[-1]).clone().numpy()
    return found


def main() -> int:
    from runtime.engines.nemo import train

    train.switch.apply = observe
    return train.train(json.loads(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    sys.exit(main())
