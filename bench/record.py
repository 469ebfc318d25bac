"""A training of ftgen's, watched closely. In: a compiled entrypoint. Out: an .npz with what it computed.

    python bench/record.py generated/NAME.py OUT.npz

Trains as `NAME.py finetune` does, and writes, in full precision: `loss` and `grad_norm` of each step, and samples of the
optimizer's float32 weights before (`weights_before`) and after (`weights_after`) the training. LoRA's second matrix
starts at random instead of zero: an adapter that adds nothing would hide what is wrong with it.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

SAMPLES = 4096  # of each weight


def main(entrypoint: Path, output: Path) -> int:
    """Train and record; the training's exit status."""
    module = load(entrypoint)
    from runtime import finetune, recipe

    build = recipe.build

    def build_and_watch(plan: dict[str, Any], *args: Any) -> Any:
        import nemo_run as run

        built = build(plan, *args)
        if plan["scheme"] == "lora":
            built.peft.lora_B_init_method = "xavier"
        built.trainer.callbacks.append(run.Config(_recorder(), output=str(output)))
        return built

    recipe.build = build_and_watch
    return finetune.finetune(module.PLAN)


def load(entrypoint: Path) -> Any:
    """The entrypoint as a module, its environment set and its runtime ready to be imported."""
    spec = importlib.util.spec_from_file_location("entrypoint", entrypoint)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.find_runtime()
    module.set_environment()
    module.set_ranks()
    from runtime import optimizations

    optimizations.before_imports(module.PLAN)
    return module


def _recorder() -> type:
    import numpy
    import torch
    from lightning.pytorch.callbacks import Callback

    class Recorder(Callback):
        """Keeps what each step computed, and the weights' samples."""

        def __init__(self, output: str) -> None:
            self.output, self.seen = output, {"loss": [], "grad_norm": []}

        def on_train_batch_start(self, trainer: Any, _module: Any, _batch: Any, index: int) -> None:
            if index == 0:
                self.before = self._weights(trainer)

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
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
