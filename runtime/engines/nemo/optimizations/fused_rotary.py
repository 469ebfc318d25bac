"""Split queries, keys and values, and rotate those of packed sequences, with a kernel of ftgen, in Triton.

In: a recipe with packed data. Out: the recipe; Megatron-Core is changed for this process.

Megatron-Core splits the output of the projection, copies the queries and the values so that they are contiguous, rotates
queries and keys in a kernel each, and in the backward pass joins three gradients with a copy. Here one kernel does all of
it, and one more in the backward pass.
"""

import functools
from typing import Any

from runtime.engines.nemo.optimizations import needs
from runtime.engines.nemo.optimizations.packs import bounds_of


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "triton:jit",
        "megatron.core.transformer.attention:SelfAttention.forward(rotary_pos_emb)",
        "megatron.core.transformer.attention:SelfAttention.forward(packed_seq_params)",
        "megatron.core.transformer.attention:SelfAttention.get_query_key_value_tensors",
    )


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Put the kernels in the place of Megatron-Core's. Call it once, before the model is built. Requires CP = 1."""
    from megatron.core.transformer.attention import SelfAttention

    SelfAttention.forward = _with_rotation_in_the_split(SelfAttention.forward)
    SelfAttention.get_query_key_value_tensors = _split_and_rotated(SelfAttention.get_query_key_value_tensors)


def _with_rotation_in_the_split(stock: Any) -> Any:
    @functools.wraps(stock)
    def forward(self: Any, *args: Any, rotary_pos_emb: Any = None, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        """Hand the angles of packed sequences to `get_query_key_value_tensors` instead of the stock rotation."""
        self.rotation = None
        if packed_seq_params is not None and _is_plain(self, rotary_pos_emb):
            self.rotation = rotary_pos_emb, bounds_of(packed_seq_params)
            rotary_pos_emb = None
        return stock(self, *args, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params, **kwargs)

    return forward


def _is_plain(attention: Any, angles: Any) -> bool:
    """Whether all of each head is rotated, in halves, queries and keys by the same angles, and nothing is normed before."""
    return (
        hasattr(angles, "shape")
        and angles.shape[-1] == attention.hidden_size_per_attention_head
        and not attention.config.rotary_interleaved
        and all(
            norm is None or type(norm).__name__ == "IdentityOp" for norm in (attention.q_layernorm, attention.k_layernorm)
        )
    )


def _split_and_rotated(stock: Any) -> Any:
    from runtime.engines.rotary import SplitAndRotate

    @functools.wraps(stock)
    def tensors(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Queries, keys and values, [tokens, 1, heads, size] each; rotated if `forward` has handed on a rotation."""
        if self.rotation is None:
            return stock(self, hidden_states, *args, **kwargs)
        angles, cu_seqlens = self.rotation
        mixed, _ = self.linear_qkv(hidden_states)  # [tokens, 1, features]
        parts = SplitAndRotate.apply(mixed.view(len(mixed), self.num_query_groups_per_partition, -1), cu_seqlens, angles)
        return tuple(part.unsqueeze(1) for part in parts)

    return tensors
