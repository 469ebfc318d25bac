"""Do not transpose the shards of FP8 weights after the optimizer's step.

In: nothing of the recipe. Out: Transformer Engine, changed for this process.

With a distributed optimizer, each rank casts its shard of every weight to FP8 as a matrix of one row. Transformer Engine also
writes a transpose of that row. Nobody reads it (the transpose of the whole weight is made when all shards are there), and it
takes far longer than the cast.
"""

from typing import Any


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Change the cast of this process."""
    skip_transposes()


def skip_transposes() -> None:
    """Leave the transposes of shards out; call it once, before the optimizer is built. The weights are the same bits."""
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
