"""Build Megatron-Bridge's own fine-tuning recipe, with the numbers of the plan.

In: a plan, a checkpoint, data. Out: a `Recipe`: Megatron-Bridge's configuration, and what is done to each batch.

This module imports Megatron-Bridge (10 s), so only a training imports it.
"""

import functools
import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.data import samplers
from megatron.bridge.data.builders import GPTSFTDatasetConfig
from megatron.bridge.data.packing import PackedSequenceSpecs
from megatron.bridge.training import mixed_precision
from torch.utils.data import DataLoader

from runtime.data.prepare import Files
from runtime.data.split import is_recipes
from runtime.engines import no_gpu, plan_values, wgrad
from runtime.job.errors import JobError

Plan = dict[str, Any]
Batch = dict[str, Any]
FP8 = {
    "current": mixed_precision.bf16_with_fp8_current_scaling_mixed,
    "delayed": mixed_precision.bf16_with_fp8_delayed_scaling_mixed,
}
# Of NeMo's recipe. Those of Megatron-Bridge are 1e-8 and 0.033. A run must learn the same with both engines.
ADAM_EPS, WEIGHT_DECAY = 1e-5, 0.1
_stock_sampler = samplers.MegatronPretrainingBatchSampler


@dataclass
class Recipe:
    """What trains: `config` is Megatron-Bridge's ConfigContainer."""

    config: Any
    # Functions that get the model and a batch, which is still on the CPU, and return the batch. The last one sees the result
    # of the others.
    changes: list[Callable[[Any, Batch], Batch]] = field(default_factory=list)


def build(plan: Plan, weights: Path, files: Files) -> Recipe:
    """The recipe. `weights` is the folder of the converted checkpoint."""
    config = stock(plan, weights / "context")
    _set_model(config, plan)
    _set_scheme(config, plan)
    _set_optimizer(config, plan)
    _set_precision(config, plan)
    _set_data(config, plan, files)
    if not is_recipes(plan):
        from runtime.engines.megatron_bridge import data

        data.install(plan, files.tokens)
    _set_training(config, plan)
    config.checkpoint.pretrained_checkpoint = str(weights / "weights")
    config.checkpoint.save = config.checkpoint.load = config.checkpoint.save_interval = None
    config.checkpoint.async_save = False
    config.tokenizer.tokenizer_model = str(weights / "context")
    # Otherwise Megatron-Bridge adds the tokenizer's special tokens to each part of an example: Llama's <|begin_of_text|>
    # would be before the input, and again before the output.
    config.tokenizer.tokenizer_hf_no_include_special_tokens = True
    if plan["gpu"]["name"] == "cpu":
        _for_the_cpu(config)
    return Recipe(config)


def stock(plan: Plan, context: Path) -> Any:
    """Megatron-Bridge's own recipe of the model. JobError: it has none of this name.

    Recipes ask the hub for the config of the model. Here they get that of the converted checkpoint.
    """
    place, name = plan["model"]["megatron_bridge_recipe"].split(":")
    library = importlib.import_module(f"megatron.bridge.recipes.{place}")
    kind = "peft" if plan["scheme"] == "lora" else "sft"
    found = [key for key in vars(library) if re.fullmatch(rf"{name}_{kind}_\d+gpu_h100_bf16_config", key)]
    if not found:
        raise JobError(f"Megatron-Bridge has no recipe {name} for {kind} in {library.__name__}", 'set engine = "nemo"')

    class Local:
        """Stands in for AutoBridge."""

        @staticmethod
        def from_hf_pretrained(_name: str, **options: Any) -> Any:
            return AutoBridge.from_hf_pretrained(str(context), **options)

    with no_gpu.replaced(library, "AutoBridge", Local):
        return vars(library)[found[0]]()


def _set_model(config: Any, plan: Plan) -> None:
    model, split = config.model, plan["parallelism"]
    model.seq_length = plan["seq_length"]
    for key in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "sequence_parallel",
    ):
        setattr(model, key, split[key])
    model.pipeline_dtype = torch.bfloat16 if split["pipeline_model_parallel_size"] > 1 else None
    if split["context_parallel_size"] > 1:
        # A rank whose part of the sequence has no answer tokens has no loss. These two settings are then required.
        model.calculate_per_token_loss = True
        config.ddp.average_in_collective = False
    if wgrad.is_stand_in():  # an optimization switches the fusion on. In an image with APEX, it is on
        model.gradient_accumulation_fusion = False


def _set_scheme(config: Any, plan: Plan) -> None:
    if plan["scheme"] == "lora":
        plan_values.set_lora(config.peft, plan)


def _set_optimizer(config: Any, plan: Plan) -> None:
    """Adam and its schedule, as NeMo's recipe has them."""
    optimizer, scheduler, rate = config.optimizer, config.scheduler, plan["optimizer"]["learning_rate"]
    warmup = plan_values.warmup_steps(plan)
    optimizer.lr, optimizer.min_lr, optimizer.adam_eps, optimizer.weight_decay = rate, 0.0, ADAM_EPS, WEIGHT_DECAY
    scheduler.start_weight_decay = scheduler.end_weight_decay = WEIGHT_DECAY
    scheduler.lr_warmup_iters = warmup
    # Megatron-Bridge's first step has the rate lr_warmup_init, by default 0. NeMo's has 1 / (warmup + 1) of the peak. With
    # this value, the rates of all steps are those of NeMo.
    scheduler.lr_warmup_init = rate / (warmup + 1) if warmup else 0.0


def _set_precision(config: Any, plan: Plan) -> None:
    precision = FP8[plan["fp8_scaling"]]() if plan["precision"] == "fp8" else mixed_precision.bf16_mixed()
    precision.grad_reduce_in_fp32 = config.ddp.grad_reduce_in_fp32 = False
    if plan["fp8_scaling"] == "current":
        # as in Megatron-Bridge's settings for H100s: megatron.bridge.perf_recipes.llama.h100
        precision.first_last_layers_bf16 = False
        config.model.disable_parameter_transpose_cache = True
    config.mixed_precision = precision


def _set_data(config: Any, plan: Plan, files: Files) -> None:
    specs = None
    packs, ending = (files.packed, "idx.parquet") if is_recipes(plan) else (files.tokens, "packs.npy")
    if packs and plan["data"]["packed"]:
        ranks = plan["parallelism"]["context_parallel_size"]
        specs = PackedSequenceSpecs(
            packed_sequence_size=plan["seq_length"],
            packed_train_data_path=str(packs / f"training.{ending}"),
            packed_val_data_path=str(packs / f"validation.{ending}"),
            packed_metadata_path=str(packs / "metadata.json"),
            pad_seq_to_mult=2 * ranks if ranks > 1 else 1,
        )
    config.dataset = GPTSFTDatasetConfig(
        seq_length=plan["seq_length"],
        dataset_root=str(files.examples),
        seed=plan["seed"],
        # The dataset shuffles if it knows how many samples are trained on. NeMo's data module computes the same number.
        max_train_samples=math.ceil(plan["global_batch_size"] * plan["max_steps"] * 1.005),
        do_validation=False,
        do_test=False,
        enable_offline_packing=specs is not None,
        offline_packing_specs=specs,
        dataset_kwargs={"pad_to_max_length": True},
        num_workers=1,
    )
    # The sampler would shuffle again, by other random numbers than NeMo's: the engines would train in another order.
    samplers.MegatronPretrainingBatchSampler = functools.partial(_stock_sampler, shuffle=False)
    # Each loader uses up a random number when it begins. With this generator it is none of those that dropout uses: these
    # are then the same in a run that validates and in one that was resumed, whose loaders begin at another step.
    samplers.DataLoader = functools.partial(DataLoader, generator=torch.Generator().manual_seed(plan["seed"]))


def _set_training(config: Any, plan: Plan) -> None:
    config.train.train_iters = plan["max_steps"]
    config.train.global_batch_size = plan["global_batch_size"]
    config.train.micro_batch_size = plan["micro_batch_size"]
    config.validation.eval_iters = 0
    config.validation.eval_interval = None
    config.logger.log_interval = 1
    config.logger.log_throughput = True
    config.logger.tensorboard_dir = None
    config.rng.seed = plan["seed"]


def _for_the_cpu(config: Any) -> None:
    from runtime.engines.megatron_bridge import cpu

    model, optimizer = cpu.plain(config.model), config.optimizer
    config.mixed_precision = None
    model.bf16 = model.fp16 = optimizer.bf16 = optimizer.fp16 = False
    model.params_dtype = optimizer.params_dtype = torch.float32
    config.dist.distributed_backend = "gloo"
    optimizer.use_distributed_optimizer = config.ddp.use_distributed_optimizer = False
    config.ddp.overlap_grad_reduce = config.ddp.overlap_param_gather = False
    optimizer.clip_grad = 0.0  # its kernel needs CUDA
    dataset = config.dataset
    dataset.num_workers, dataset.pin_memory, dataset.persistent_workers = 0, False, False
