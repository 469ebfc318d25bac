"""Let Megatron-Core's own attention take packed sequences, on a CPU. Its kernel for them needs a GPU.

In: Megatron-Core. Out: its DotProductAttention, changed for this process.
"""

from itertools import pairwise
from typing import Any

import torch


def install() -> None:
    """Compute the attention of each packed sequence by itself."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    stock = DotProductAttention.forward

    def forward(
        self: Any, query: Any, key: Any, value: Any, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> Any:
        """Attention of query [tokens, heads, size] or [tokens, 1, heads, size]; Megatron-Core's own if nothing is packed."""
        if packed_seq_params is None:
            return stock(self, query, key, value, *args, **kwargs)
        ends = packed_seq_params.cu_seqlens_q.flatten().tolist()
        return attention(query, key, value, ends, self.softmax_scale)

    DotProductAttention.forward = forward


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: list[int], scale: float) -> torch.Tensor:
    """Causal attention within each sequence: [tokens, heads * size], or [tokens, 1, heads * size] if query has a batch."""
    has_batch = query.dim() == 4
    q, k, v = ((each.squeeze(1) if has_batch else each).transpose(0, 1) for each in (query, key, value))
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    attend = torch.nn.functional.scaled_dot_product_attention
    parts = [attend(q[:, b:e], k[:, b:e], v[:, b:e], is_causal=True, scale=scale) for b, e in pairwise(ends) if e > b]
    whole = torch.cat(parts, 1).transpose(0, 1).flatten(1)
    return whole.unsqueeze(1) if has_batch else whole
