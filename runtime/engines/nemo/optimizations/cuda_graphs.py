"""Capture each layer in local CUDA graphs of Megatron-Core, and make them right for FP8.

In: a recipe. Out: the recipe with graphs on, and Megatron-Core's class changed for this process.

Replays of a captured layer would get two things wrong.

Transposed weights: Transformer Engine keeps a transposed copy of each FP8 weight for the backward pass. The forward pass renews
it when the optimizer has marked it as old. A captured forward pass contains only what ran during capture, when the copy was
fresh, so replays would keep the transposes of the first step and the gradients would be wrong. Here the copies are renewed in
place, before the graph of a layer is replayed: once a step, when they are old.

Scales of a fused MLP: before Megatron-Core captures a layer, it runs the layer on whatever is in its buffers, and then restores
the amax history and scales of Transformer Engine. It misses those of a fused MLP, which is not a submodule. Here they are
restored too.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch local graphs on."""
    if "expandable_segments" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        os.environ.pop("PYTORCH_CUDA_ALLOC_CONF")  # Megatron-Core refuses graphs with it
    recipe.model.config.cuda_graph_impl = "local"
    recipe.trainer.strategy.use_te_rng_tracker = True
    recipe.data.packed_sequence_specs.pad_cu_seqlens = True
    mend_fp8()


def mend_fp8() -> None:
    """Make captured layers right in FP8; call it once, before the model is built."""
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
    """The module's weights in FP8 that have a transposed copy."""
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
    """The basic operations of a layer's fused MLP, which Megatron-Core keeps in a tuple of its own."""
    for module in layer.modules():
        for fused in getattr(module, "_fused_impl", None) or ():
            yield from (operation for operation in fused.modules() if hasattr(operation, "_save_fp8_metas"))
