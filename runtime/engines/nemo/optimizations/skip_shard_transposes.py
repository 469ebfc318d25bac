"""Do not transpose the shards of FP8 weights after the optimizer's step.

In: a recipe, which stays as it is. Out: Transformer Engine, changed for this process.

With a distributed optimizer, each rank casts its shard of every weight to FP8, as a matrix with one row. Transformer
Engine also writes a transpose of that row, which takes far longer than the cast. Nothing reads that transpose: once
all shards are gathered, Transformer Engine transposes the whole weight.
"""

from typing import Any

from runtime.engines.nemo.optimizations import needs


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "transformer_engine.pytorch.tensor.utils:_cast_master_weights_to_fp8_delayed_scaling",
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Tensor._get_quantizer",
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Quantizer.set_usage(columnwise)",
    )


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Leave out the transposes in this process."""
    skip_transposes()


def skip_transposes() -> None:
    """Leave out the transposes of shards. Call it once, before the optimizer is built. The weights keep the same bits."""
    from transformer_engine.pytorch.tensor import utils

    utils._cast_master_weights_to_fp8_delayed_scaling = _without_transposes(
        utils._cast_master_weights_to_fp8_delayed_scaling
    )


def _without_transposes(cast: Any) -> Any:
    def cast_rows(weights: list[Any], *args: Any, **kwargs: Any) -> None:
        quantizers = [weight._get_quantizer() for weight, *_ in weights]
        wanted = [quantizer.columnwise_usage for quantizer in quantizers]
        for quantizer in quantizers:
            quantizer.set_usage(columnwise=False)
        cast(weights, *args, **kwargs)
        for quantizer, columnwise in zip(quantizers, wanted, strict=True):
            quantizer.set_usage(columnwise=columnwise)

    return cast_rows
