"""Megatron-Core's local CUDA graphs, made right for weights that are kept in FP8.

Transformer Engine keeps a transposed copy of each FP8 weight for the backward pass, and renews it in the forward pass
when the optimizer has marked it as old. A captured forward pass holds only what was done while it was captured, when
the copy was fresh: replays would go on with the transposes of the first step, and the model would learn from wrong
gradients. Here the copies are renewed, in place, before a layer's graph is replayed: once a step, when they are old.
"""

import functools
from typing import Any


def refresh_fp8_transposes() -> None:
    """Renew a layer's old FP8 transposes before each replay of its graph; call it once, before the model is built."""
    from megatron.core.transformer.cuda_graphs import _CudaGraphRunner

    replay = _CudaGraphRunner.replay_graph_capture

    @functools.wraps(replay)
    def with_fresh_transposes(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights = self.__dict__.get("_ftgen_fp8_weights")
        if weights is None:
            weights = self.__dict__["_ftgen_fp8_weights"] = _fp8_weights(self.base_module)
        for weight in weights:
            if weight._transpose_invalid:
                weight._create_transpose()
        return replay(self, *args, **kwargs)

    _CudaGraphRunner.replay_graph_capture = with_fresh_transposes


def _fp8_weights(module: Any) -> list[Any]:
    """The module's weights in FP8 that have a transposed copy."""
    return [weight for weight in module.parameters() if getattr(weight, "_transpose", None) is not None]
