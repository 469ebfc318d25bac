"""A training of ftgen's, watched closely. In: a compiled entrypoint. Out: an .npz with what it computed.

    python bench/record.py generated/NAME.py OUT.npz [--nudge] [--random]

Trains as `NAME.py finetune` does, and writes, in full precision: `loss` and `grad_norm` of each step, and samples of the
optimizer's float32 weights before (`weights_before`) and after (`weights_after`) the training. LoRA's second matrix
starts at random instead of zero: an adapter that adds nothing would hide what is wrong with it. `--nudge` makes one weight
larger by one BF16 unit in the last place before the first step: how far that alone drives two trainings apart. `--random`
starts from weights that Megatron-Core draws from the seed, where only the tokenizer of a converted checkpoint is there.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

SAMPLES = 4096  # of each weight
ULP = 2**-7  # of BF16 at 1, where the norms' weights start


def main() -> int:
    """Train and record; the training's exit status."""
    options = _options()
    module = load(options.entrypoint, options.random)
    from runtime.engines.nemo import recipe, train

    build = recipe.build

    def build_and_watch(plan: dict[str, Any], *args: Any) -> Any:
        import nemo_run as run

        built = build(plan, *args)
        if options.random:
            start_from_random(built, args[0])
        if plan["scheme"] == "lora":
            built.peft.lora_B_init_method = "xavier"
        built.trainer.callbacks.append(run.Config(_recorder(), output=str(options.output), nudge=options.nudge))
        return built

    recipe.build = build_and_watch  # type: ignore[assignment] # train.py calls it by this name
    return train.train(module.PLAN)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("entrypoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--nudge", action="store_true")
    parser.add_argument("--random", action="store_true")
    return parser.parse_args()


def load(entrypoint: Path, random: bool = False) -> Any:
    """The entrypoint as a module, its environment set and its runtime ready; `random`: one that needs no checkpoint."""
    spec = importlib.util.spec_from_file_location("entrypoint", entrypoint)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.find_runtime()
    module.set_environment()
    from runtime.engines.nemo import convert
    from runtime.engines.nemo.optimizations import switch
    from runtime.job import ranks

    ranks.be_a_rank(module.PLAN)
    switch.before_imports(module.PLAN)
    if random:
        convert.converted = lambda plan: True  # noqa: ARG005 - train.py calls it by this name
    return module


def start_from_random(recipe: Any, place: Path) -> None:
    """Let a recipe start from random weights; of the checkpoint's `place` it takes the tokenizer."""
    import nemo_run as run
    from nemo.collections.common.tokenizers import AutoTokenizer

    recipe.resume = None
    recipe.tokenizer = run.Config(AutoTokenizer, str(place / "context" / "nemo_tokenizer"))
    recipe.trainer.strategy.use_te_rng_tracker = recipe.trainer.accelerator == "gpu"  # others would draw others


def _recorder() -> type:
    import numpy
    import torch
    from lightning.pytorch.callbacks import Callback

    class Recorder(Callback):  # type: ignore[misc]
        """Keeps what each step computed, and the weights' samples."""

        def __init__(self, output: str, nudge: bool) -> None:
            self.output, self.nudge = output, nudge
            self.seen: dict[str, list[float]] = {"loss": [], "grad_norm": []}

        def on_train_batch_start(self, trainer: Any, module: Any, *_args: Any) -> None:
            if not self.seen["loss"]:  # NeMo's own count of batches begins with 0 twice
                self.before = self._weights(trainer)
                if self.nudge:
                    (norm,) = [p for name, p in module.named_parameters() if name.endswith("final_layernorm.weight")]
                    norm.data[0] *= 1 + ULP

        def on_train_batch_end(self, trainer: Any, *_args: Any) -> None:
            metrics = trainer.callback_metrics
            for key, name in (("loss", "reduced_train_loss"), ("grad_norm", "grad_norm")):
                self.seen[key].append(float(metrics[name]) if name in metrics else float("nan"))

        def on_train_end(self, trainer: Any, _module: Any) -> None:
            if os.environ.get("RANK", "0") == "0":
                after = self._weights(trainer)
                numpy.savez(self.output, weights_before=self.before, weights_after=after, **self.seen)

        @staticmethod
        def _weights(trainer: Any) -> Any:
            optimizers = [optimizer.mcore_optimizer for optimizer in trainer.optimizers]
            weights = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
            flat = [weight.detach().flatten() for weight in weights]
            samples = [f[:: max(1, f.numel() // SAMPLES)][:SAMPLES].float().cpu() for f in flat]
            return torch.cat(samples).numpy()

    globals()["Recorder"] = Recorder
    Recorder.__qualname__ = "Recorder"
    return Recorder


if __name__ == "__main__":
    sys.exit(main())
