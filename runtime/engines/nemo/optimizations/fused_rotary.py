"""Rotate the queries and keys of packed sequences with a kernel of ftgen, in Triton.

In: a recipe with packed data. Out: the recipe; Megatron-Core is changed for this process.
"""

import functools
from typing import Any

from runtime.engines.nemo.optimizations import needs


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "triton:jit",
        "megatron.core.models.common.embeddings.rope_utils:fused_apply_rotary_pos_emb_thd",
    )


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Put the kernel in the place of Transformer Engine's. Call it once, before the model is built."""
    from megatron.core.models.common.embeddings import rope_utils

    rope_utils.fused_apply_rotary_pos_emb_thd = _with_own_kernel(rope_utils.fused_apply_rotary_pos_emb_thd)


def _with_own_kernel(stock: Any) -> Any:
    from runtime.engines.rotary import Rotate

    @functools.wraps(stock)
    def rotate(heads: Any, cu_seqlens: Any, angles: Any, cp_size: int = 1, cp_rank: int = 0) -> Any:
        if cp_size > 1 or angles.shape[-1] != heads.shape[-1]:  # a part of each sequence, or of each head
            return stock(heads, cu_seqlens, angles, cp_size=cp_size, cp_rank=cp_rank)
        return Rotate.apply(heads, cu_seqlens, angles)

    return rotate
