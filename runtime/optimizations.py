"""What makes a step faster than NeMo's stock recipe, each by name. In: a recipe and a plan. Out: the recipe, changed.

`before_imports` comes before NeMo is imported, `apply` once the recipe is built. An optimization that is off leaves the
stock recipe as it is. Measured effects and numerics of each: the catalogue's optimizations.toml.
"""

import os
import sys
from typing import Any

from runtime.progress import say

Plan = dict[str, Any]


def before_imports(plan: Plan) -> None:
    """What Megatron-Core decides while it is imported."""
    if plan["optimizations"]["fused_wgrad_accumulation"]:
        from runtime import wgrad

        sys.modules.setdefault("fused_weight_gradient_mlp_cuda", wgrad)


def apply(recipe: Any, plan: Plan) -> None:
    """Turn on what the plan has on."""
    on = [name for name, is_on in plan["optimizations"].items() if is_on]
    say(f"optimizations: {', '.join(on) or 'none, the stock recipe'}")
    for name in on:
        _APPLY[name](recipe, plan)


def _cuda_graphs(recipe: Any, _plan: Plan) -> None:
    from runtime import graphs

    if "expandable_segments" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        os.environ.pop("PYTORCH_CUDA_ALLOC_CONF")  # Megatron-Core refuses graphs with it
    recipe.model.config.cuda_graph_impl = "local"
    recipe.trainer.strategy.use_te_rng_tracker = True
    recipe.data.packed_sequence_specs.pad_cu_seqlens = True
    graphs.mend_fp8()


def _fused_cross_entropy(recipe: Any, _plan: Plan) -> None:
    recipe.model.config.cross_entropy_loss_fusion = True
    recipe.model.config.cross_entropy_fusion_impl = "te"


def _loss_tokens_only(recipe: Any, _plan: Plan) -> None:
    from runtime import loss_tokens

    loss_tokens.install(recipe.model.config)


def _scale_small_tensor(_recipe: Any, _plan: Plan) -> None:
    from runtime import adapters

    adapters.scale_small_tensor()


def _fused_wgrad_accumulation(recipe: Any, _plan: Plan) -> None:
    recipe.model.config.gradient_accumulation_fusion = True


def _skip_nan_check(recipe: Any, _plan: Plan) -> None:
    from runtime.recipe import ddp

    recipe.trainer.strategy.ddp = ddp(recipe, check_for_nan_in_grad=False)


def _fused_swiglu(recipe: Any, plan: Plan) -> None:
    recipe.model.config.use_transformer_engine_op_fuser = True
    if not plan["optimizations"]["op_fuser"]:
        from nemo.collections.llm.peft import lora

        lora.HAVE_TE_FUSED_LORA = False  # the same setting would fuse the adapters too, which rounds their input


def _skip_shard_transposes(_recipe: Any, _plan: Plan) -> None:
    from runtime import shards

    shards.skip_transposes()


def _short_padding(recipe: Any, _plan: Plan) -> None:
    from runtime import packs

    packs.short_padding(recipe.data, recipe.model.config)


def _merge_micro_batches(recipe: Any, plan: Plan) -> None:
    from runtime import packs

    count = plan["global_batch_size"] // plan["parallelism"]["data_parallel_size"]
    packs.merge_micro_batches(recipe.data, recipe.model.config, count)


def _op_fuser(recipe: Any, _plan: Plan) -> None:
    recipe.model.config.use_transformer_engine_op_fuser = True


_APPLY = {
    "cuda_graphs": _cuda_graphs,
    "fused_cross_entropy": _fused_cross_entropy,
    "loss_tokens_only": _loss_tokens_only,
    "scale_small_tensor": _scale_small_tensor,
    "fused_wgrad_accumulation": _fused_wgrad_accumulation,
    "skip_nan_check": _skip_nan_check,
    "fused_swiglu": _fused_swiglu,
    "skip_shard_transposes": _skip_shard_transposes,
    "short_padding": _short_padding,
    "merge_micro_batches": _merge_micro_batches,
    "op_fuser": _op_fuser,
}
