"""Compute the attention of packed sequences with kernels of ftgen, in Triton, which are faster for short sequences.

In: a recipe with packed data. Out: the recipe; Megatron-Core is changed for this process.

cuDNN's kernels, which Transformer Engine uses, work on each sequence as if it were as long as the longest one, and spread
the backward pass over five kernels. runtime/engines/short_attention.py has the kernels.
"""

import functools
from pathlib import Path
from typing import Any

from runtime.engines import padding
from runtime.engines.nemo.optimizations import needs
from runtime.engines.nemo.optimizations.packs import bounds_of
from runtime.job.progress import say

LONGEST = 512  # tokens: cuDNN is faster if there are longer examples


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "triton:jit",
        "megatron.core.extensions.transformer_engine:TEDotProductAttention.forward(packed_seq_params)",
        "nemo.collections.llm.gpt.data.packed_sequence:PackedSequenceSpecs.packed_metadata_path",
    )


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Put the kernels in the place of Transformer Engine's, unless an example is long. Requires packed data and CP = 1.

    Call it once, before the model is built.
    """
    longest = padding.longest_sequence(Path(recipe.data.packed_sequence_specs.packed_metadata_path))
    if longest > LONGEST:
        say(f"short_attention: not used, because an example has {longest} tokens: above {LONGEST}, cuDNN is faster")
        return
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    TEDotProductAttention.forward = with_own_kernels(TEDotProductAttention.forward)


def with_own_kernels(stock: Any) -> Any:
    """The forward pass of Megatron-Core's attention: the kernels for packed sequences that they know, else its own."""
    from runtime.engines.short_attention import Attend

    @functools.wraps(stock)
    def forward(
        self: Any, query: Any, key: Any, value: Any, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> Any:
        """[tokens, heads * size] of query [tokens, heads, size], key and value [tokens, groups, size]."""
        if packed_seq_params is None or not _is_known(self, query, key, value):
            return stock(self, query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs)
        scale = getattr(self, "softmax_scale", None) or query.shape[-1] ** -0.5
        return Attend.apply(query, key, value, bounds_of(packed_seq_params), scale).flatten(1)

    return forward


def _is_known(attention: Any, query: Any, key: Any, value: Any) -> bool:
    """Whether the mask is causal without a window, nothing is dropped, and all sizes are powers of two."""
    sizes = query.shape[-1], query.shape[1] // key.shape[1]
    config = attention.config
    return (
        key.shape == value.shape
        and all(size & (size - 1) == 0 for size in sizes)
        and not config.attention_dropout
        and not getattr(config, "window_size", None)
        and "causal" in str(getattr(attention, "attn_mask_type", "causal"))
    )
