"""Build NeMo's own fine-tuning recipe, with the numbers of the plan.

In: a plan, a checkpoint, data. Out: a recipe, as a `run.Partial`.

This module imports NeMo (15-40 s), so only a training imports it.
"""

import functools
import importlib
import inspect
from pathlib import Path
from typing import Any

import fiddle
import nemo_run as run
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from megatron.core.distributed import DistributedDataParallelConfig
from nemo import lightning as nl
from nemo.collections.llm.gpt.data.fine_tuning import FineTuningDataModule
from nemo.collections.llm.gpt.data.packed_sequence import PackedSequenceSpecs
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_with_fp8_mixed
from nemo.lightning import _strategy_lib

from runtime.data.prepare import Files
from runtime.data.split import is_recipes
from runtime.engines import plan_values

Plan = dict[str, Any]
ARCHITECTURE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")


def build(plan: Plan, checkpoint: Path, files: Files, log_directory: Path) -> Any:
    """The recipe; `fiddle.build(recipe)()` trains. It writes only into `log_directory`."""
    recipe = stock(plan, log_directory)
    set_model(recipe, plan)
    _set_scheme(recipe, plan)
    _set_optimizer(recipe, plan)
    _set_parallelism(recipe, plan)
    _set_precision(recipe, plan)
    _set_data(recipe, plan, files)
    _set_trainer(recipe, plan)
    recipe.log.ckpt = recipe.log.tensorboard = None
    recipe.log.use_datetime_version = False
    recipe.resume = run.Config(nl.AutoResume, restore_config=run.Config(nl.RestoreConfig, path=str(checkpoint)))
    if plan["gpu"]["name"] == "cpu":
        _for_the_cpu(recipe)
    # NeMo has no setting for the seed of adapters and dropout: it is only a default argument of this function.
    _strategy_lib.init_parallel_ranks = functools.partial(_strategy_lib.init_parallel_ranks, seed=plan["seed"])
    return recipe


def stock(plan: Plan, log_directory: Path) -> Any:
    """NeMo's own recipe of the model. It gets those of our arguments that it has; they differ between models."""
    library = importlib.import_module(f"nemo.collections.llm.recipes.{plan['model']['nemo_recipe']}")
    arguments = {
        "dir": str(log_directory),
        "name": "nemo",
        "num_nodes": plan["nodes"],
        "num_gpus_per_node": plan["gpus_per_node"],
        "peft_scheme": "lora" if plan["scheme"] == "lora" else "none",
        "seq_length": plan["seq_length"],
        "packed_sequence": plan["data"]["packed"],
        "performance_mode": True,
    }
    accepted = inspect.signature(library.finetune_recipe).parameters
    vars(library)["default_finetune_recipe"] = _with_a_list_of_callbacks(library.default_finetune_recipe)
    return library.finetune_recipe(**{key: value for key, value in arguments.items() if key in accepted})


def _with_a_list_of_callbacks(default: Any) -> Any:
    """NeMo 2.1 appends to the callbacks of its default recipe, which has none."""

    @functools.wraps(default)
    def with_a_list(*args: Any, **kwargs: Any) -> Any:
        recipe = default(*args, **kwargs)
        recipe.trainer.callbacks = recipe.trainer.callbacks or []
        return recipe

    return with_a_list


def set_model(recipe: Any, plan: Plan) -> None:
    """Set the plan's architecture in the recipe's model."""
    config, model = recipe.model.config, plan["model"]
    for key in ARCHITECTURE:
        setattr(config, key, model[key])
    config.rotary_base = int(model["rope_theta"])
    config.kv_channels = model["head_size"]
    config.share_embeddings_and_output_weights = model["tied_embeddings"]
    config.add_qkv_bias = model["qkv_bias"]
    if model["rope_scaling_factor"]:
        config.scale_factor = model["rope_scaling_factor"]
    if model["nemo_recipe"].startswith("mistral"):
        # NeMo's Mistral 7B has the sliding window of v0.1. Later versions have none (sliding_window in config.json).
        config.window_size = None
    config.seq_length = recipe.data.seq_length = plan["seq_length"]
    # some of NeMo's recipes count embedding and loss as pipeline layers; the plan counts only transformer layers
    for key in ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"):
        if hasattr(config, key):  # since NeMo 2.2
            setattr(config, key, False)


def _set_scheme(recipe: Any, plan: Plan) -> None:
    if plan["scheme"] == "lora":
        plan_values.set_lora(recipe.peft, plan)


def _set_optimizer(recipe: Any, plan: Plan) -> None:
    recipe.optim.config.lr = plan["optimizer"]["learning_rate"]
    recipe.optim.lr_scheduler.warmup_steps = plan_values.warmup_steps(plan)


def _set_parallelism(recipe: Any, plan: Plan) -> None:
    strategy, split = recipe.trainer.strategy, plan["parallelism"]
    for key in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "sequence_parallel",
    ):
        setattr(strategy, key, split[key])
    if split["context_parallel_size"] > 1:
        # A rank whose part of the sequence has no answer tokens has no loss. NeMo then requires these two settings.
        recipe.model.config.calculate_per_token_loss = True
        strategy.ddp = ddp(recipe, average_in_collective=False)


def ddp(recipe: Any, **changes: Any) -> Any:
    """The recipe's data-parallel settings with changes. In some recipes they are only the name of a strategy."""
    settings = recipe.trainer.strategy.ddp
    if isinstance(settings, str):
        settings = run.Config(DistributedDataParallelConfig, check_for_nan_in_grad=True)
    for key, value in changes.items():
        setattr(settings, key, value)
    return settings


def _set_precision(recipe: Any, plan: Plan) -> None:
    if plan["precision"] == "fp8":
        recipe.trainer.plugins = bf16_with_fp8_mixed()
    recipe.trainer.plugins.grad_reduce_in_fp32 = False


def _set_data(recipe: Any, plan: Plan, files: Files) -> None:
    # The recipe's data module is SquadDataModule. It downloads nothing if training.jsonl exists. In NeMo 2.1, it takes no
    # folder; the class that it derives from does.
    root, packs, ending = files.examples, files.packed, "npy"
    if not is_recipes(plan):
        from runtime.engines.nemo.data import TokensDataModule  # NeMo 2.3 and later have what it derives from

        fiddle.update_callable(recipe.data, TokensDataModule)
        root, packs, ending = files.tokens, files.tokens, "packs.npy"
    elif not hasattr(recipe.data, "dataset_root"):
        recipe.data = run.Config(FineTuningDataModule, **recipe.data.__arguments__)
    recipe.data.dataset_root = str(root)
    recipe.data.seed = plan["seed"]
    recipe.data.global_batch_size = plan["global_batch_size"]
    recipe.data.micro_batch_size = plan["micro_batch_size"]
    if packs and plan["data"]["packed"]:
        recipe.data.packed_sequence_specs = run.Config(
            PackedSequenceSpecs,
            packed_sequence_size=plan["seq_length"],
            packed_train_data_path=str(packs / f"training.{ending}"),
            packed_val_data_path=str(packs / f"validation.{ending}"),
        )
        if (packs / "metadata.json").is_file():  # since NeMo 2.2
            recipe.data.packed_sequence_specs.packed_metadata_path = str(packs / "metadata.json")


def _set_trainer(recipe: Any, plan: Plan) -> None:
    trainer = recipe.trainer
    trainer.max_steps = plan["max_steps"]
    trainer.limit_val_batches = 0
    trainer.val_check_interval = None
    trainer.enable_checkpointing = False
    trainer.logger = False
    # Slurm and torchrun set different variables. The entrypoint always sets those of torchrun.
    trainer.plugins = [trainer.plugins, run.Config(TorchElasticEnvironment)]


def _for_the_cpu(recipe: Any) -> None:
    from runtime.engines.nemo import cpu

    for key, value in (cpu.plain() | {"params_dtype": torch.float32}).items():  # NeMo's config of Mistral 7B has bfloat16
        setattr(recipe.model.config, key, value)
    trainer, optimizer = recipe.trainer, recipe.optim.config
    trainer.accelerator = "cpu"
    trainer.plugins = trainer.plugins[1:]  # no mixed precision
    trainer.callbacks = [callback for callback in trainer.callbacks if "CommOverlap" not in str(callback)]
    trainer.strategy.ddp = ddp(recipe, overlap_grad_reduce=False, overlap_param_gather=False)
    trainer.strategy.pipeline_dtype = None
    optimizer.bf16 = False
    optimizer.use_distributed_optimizer = False
    optimizer.clip_grad = 0.0  # its kernel needs CUDA
    recipe.data.num_workers = 0
