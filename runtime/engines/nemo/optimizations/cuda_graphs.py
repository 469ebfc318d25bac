"""Run each layer as a local CUDA graph of Megatron-Core, and correct two errors of these graphs in FP8.

In: a recipe. Out: the recipe with graphs on, and Megatron-Core changed for this process.

1. Transposed weights. Transformer Engine keeps a transposed copy of each FP8 weight for the backward pass. The
forward pass renews the copy if the optimizer has marked it as old. The copy was fresh during the capture, so the
captured forward pass does not renew it: every replay would use the transposes of the first step, and the gradients
would be wrong. Here the old copies are renewed in place before the graph of a layer is replayed.

2. Scales of a fused MLP. Before Megatron-Core captures a layer, it runs the layer on whatever its buffers contain,
and then restores the amax history and the scales of Transformer Engine. It misses those of a fused MLP, which is not
a submodule. Here they are restored too.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

from runtime.engines.nemo.optimizations import needs


def missing(recipe: Any, plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing. In FP8, also what the corrections change."""
    fp8 = (
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Tensor._create_transpose",
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Tensor._transpose_invalid",
        "transformer_engine.pytorch.ops.op:BasicOperation._save_fp8_metas",
        "transformer_engine.pytorch.ops.op:BasicOperation._load_fp8_metas",
    )
    return needs.missing_in_config(recipe, "cuda_graph_impl") or needs.missing(
        "megatron.core.transformer.cuda_graphs:_CudaGraphRunner.replay_graph_capture",
        "megatron.core.transformer.cuda_graphs:_CudaGraphRunner.create_fwd_graph",
        "nemo.lightning:MegatronStrategy(use_te_rng_tracker)",
        "nemo.collections.llm.gpt.data.packed_sequence:PackedSequenceSpecs.pad_cu_seqlens",
        *(fp8 if plan["precision"] == "fp8" else ()),
    )


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch local graphs on."""
    if "expandable_segments" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        os.environ.pop("PYTORCH_CUDA_ALLOC_CONF")  # Megatron-Core allows no graphs with it
    recipe.model.config.cuda_graph_impl = "local"
    recipe.trainer.strategy.use_te_rng_tracker = True
    recipe.data.packed_sequence_specs.pad_cu_seqlens = True
    correct_fp8()


def correct_fp8() -> None:
    """Correct both errors. Call it once, before the model is built."""
    from megatron.core.transformer.cuda_graphs import _CudaGraphRunner

    _CudaGraphRunner.replay_graph_capture = _with_fresh_transposes(_CudaGraphRunner.replay_graph_capture)
    _CudaGraphRunner.create_fwd_graph = _with_scales_kept(_CudaGraphRunner.create_fwd_graph)


def _with_fresh_transposes(replay: Any) -> Any:
    @functools.wraps(replay)
    def replay_fresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights = self.__dict__.get("_ftgen_fp8_weights")
        if weights is None:
            weights = self.__dict__["_ftgen_fp8_weights"] = _fp8_weights(self.base_module)
        for weight in weights:
            if weight._transpose_invalid:
                weight._create_transpose()
        return replay(self, *args, **kwargs)

    return replay_fresh


def _fp8_weights(module: Any) -> list[Any]:
    """The FP8 weights of the module that have a transposed copy."""
    return [weight for weight in module.parameters() if getattr(weight, "_transpose", None) is not None]


def _with_scales_kept(create: Any) -> Any:
    @functools.wraps(create)
    def create_and_restore(self: Any, *args: Any, **kwargs: Any) -> None:
        kept = [(operation, operation._save_fp8_metas()) for operation in _fused_operations(self.base_module)]
        create(self, *args, **kwargs)
        for operation, scales in kept:
            operation._load_fp8_metas(scales)

    return create_and_restore


def _fused_operations(layer: Any) -> Iterator[Any]:
    """The operations of a layer's fused MLP, which Megatron-Core keeps in the tuple `_fused_impl`."""
    for module in layer.modules():
        for fused in getattr(module, "_fused_impl", None) or ():
            yield from (operation for operation in fused.modules() if hasattr(operation, "_save_fp8_metas"))
