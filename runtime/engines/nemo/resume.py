"""Resume a training from a checkpoint, so that it trains exactly what an uninterrupted one does.

In: a recipe and a checkpoint. Out: the recipe, changed, and NeMo, changed for this process.

NeMo 2.7.3 alone resumes on wrong data. Five things are changed (a test compares each loss, learning rate and batch):

1. Length of the data. Lightning counts batches from the start of the run, NeMo's sampler those that are left. The
   resumed epoch ended early, and the data began again.
2. The checkpoint is the one that ftgen has chosen. NeMo's own choice fails if its newest copy is half-written.
3. Base weights and tokenizer come from the converted checkpoint, which stays. NeMo takes the tokenizer from the
   checkpoint before, which may be deleted; and with LoRA it takes the base from the path that it once had.
4. Random numbers. NeMo saves no state of the generators. With dropout, each step gets a seed of its own.
5. Scales of FP8. With LoRA, NeMo saves the adapters alone. The scales and the amax history of the frozen layers are saved
   with them. Not measured yet: the plan's rules refuse FP8 until bench/resume.py has shown that it resumes exactly.

This module imports NeMo, so only a training imports it.
"""

from pathlib import Path
from typing import Any

import nemo_run as run
from lightning.pytorch.callbacks import Callback
from nemo import lightning as nl
from nemo.collections.common.data.data_samplers import MegatronPretrainingBatchSampler
from nemo.lightning import megatron_init
from nemo.lightning.pytorch.callbacks import PEFT
from nemo.lightning.resume import AdapterPath

Plan = dict[str, Any]


def prepare(recipe: Any, plan: Plan) -> None:
    """Make a run resumable. This concerns its first attempt as well: all attempts must train alike."""
    MegatronPretrainingBatchSampler.__len__ = _whole_length
    if plan["lora"] and plan["precision"] == "fp8":
        PEFT.adapter_key_filter = _with_scales(PEFT.adapter_key_filter)
    if plan["lora"] and plan["lora"]["dropout"]:
        recipe.trainer.callbacks = [*(recipe.trainer.callbacks or []), run.Config(Reseed, plan["seed"])]


def resume(recipe: Any, checkpoint: Path) -> None:
    """Make the recipe go on from a checkpoint."""
    recipe.resume = run.Config(Resume, restore_config=recipe.resume.restore_config, resume_from_path=str(checkpoint))


class Reseed(Callback):  # type: ignore[misc]
    """Seeds the random numbers before each step, from the step's number."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Any, *_args: Any) -> None:
        """Seed the generators as NeMo does at the start of a run."""
        megatron_init._set_random_seed(self.seed + 1 + trainer.global_step)


class Resume(nl.AutoResume):  # type: ignore[misc]
    """Resumes from `resume_from_path`, with base weights and tokenizer from `restore_config.path`."""

    def get_trainer_ckpt_path(self, _model: Any = None) -> Path:
        """The weights of the checkpoint; for adapters, also the path of the base weights."""
        weights = Path(self.resume_from_path) / "weights"
        if (weights / "adapter_metadata.json").exists():
            return AdapterPath(weights, base_model_path=Path(self.restore_config.path))  # type: ignore[no-any-return]
        return weights

    def get_context_path(self, _model: Any = None) -> Path:
        """Where the tokenizer is."""
        return Path(self.restore_config.path) / "context"


def _with_scales(is_adapter: Any) -> Any:
    def is_saved(self: Any, key: Any) -> bool:
        """Whether a LoRA checkpoint has this key: a weight of an adapter, or the FP8 state of any layer."""
        return is_adapter(self, key) or (isinstance(key, str) and key.endswith("_extra_state"))

    return is_saved


def _whole_length(sampler: Any) -> int:
    """Number of batches from the start of the run, as `MegatronPretrainingBatchSampler.__len__`."""
    whole, left = divmod(sampler.total_samples, sampler.global_batch_size)
    return int(whole + (1 if left and not sampler.drop_last else 0))
