"""Hugging Face's names of weights, and where these weights are in Megatron's tensors. For Llama, Mistral and Qwen2.

In: a name of Hugging Face and the shape of the model. Out: the name of Megatron's tensor, its layer, and its rows.

Megatron fuses weights of a layer. The rows of `linear_qkv` are, for each query group: its query heads, its key, its
value. The rows of `linear_fc1` are those of the gate, then those of the up projection. Its tensor of a weight has a
first dimension for the layers, whatever pipeline stage trained them.
"""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

# By the names that Hugging Face has in a layer: Megatron's name in a layer, and the part of its rows.
LINEAR = {
    "self_attn.q_proj": ("self_attention.linear_qkv", "q"),
    "self_attn.k_proj": ("self_attention.linear_qkv", "k"),
    "self_attn.v_proj": ("self_attention.linear_qkv", "v"),
    "self_attn.o_proj": ("self_attention.linear_proj", ""),
    "mlp.gate_proj": ("mlp.linear_fc1", "gate"),
    "mlp.up_proj": ("mlp.linear_fc1", "up"),
    "mlp.down_proj": ("mlp.linear_fc2", ""),
}
# The norms are fused into the linear layers that follow them.
NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "post_attention_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
OUTSIDE = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}
LAYERS = "decoder.layers."
HEAD, EMBEDDING = OUTSIDE["lm_head.weight"], OUTSIDE["model.embed_tokens.weight"]
PADDED = {HEAD, EMBEDDING}  # Megatron adds rows, so that tensor-parallel ranks have equal parts
COMPUTED = re.compile(r"rotary_emb\.inv_freq$")  # in old checkpoints of Llama; nothing reads it


class Source(NamedTuple):
    """Where the weight of one name of Hugging Face is."""

    name: str  # of Megatron's tensor
    layer: int | None  # row of its first dimension
    linear: str  # of LINEAR's values, such as self_attention.linear_qkv; "" outside of linear layers of a layer
    part: str  # q, k, v, gate, up; "": all rows


def source(name: str) -> Source | None:
    """Where a weight is; None for a name that these families do not have."""
    if name in OUTSIDE:
        return Source(OUTSIDE[name], None, "", "")
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+?)\.(weight|bias)", name)
    if not found:
        return None
    layer, module, kind = int(found[1]), found[2], found[3]
    if module in LINEAR:
        linear, part = LINEAR[module]
        return Source(f"{LAYERS}{linear}.{kind}", layer, linear, part)
    norm = NORMS.get(f"{module}.{kind}")
    return Source(LAYERS + norm, layer, "", "") if norm else None


def rows(tensor: "torch.Tensor", part: str, model: dict[str, Any]) -> "torch.Tensor":
    """The rows of a part of a fused tensor [rows, ...]; all rows for part "". `model` is the plan's."""
    if part in {"gate", "up"}:
        return tensor.chunk(2)[part == "up"]
    if not part:
        return tensor
    groups, size = model["num_query_groups"], model["head_size"]
    queries = model["num_attention_heads"] // groups
    grouped = tensor.reshape(groups, queries + 2, size, *tensor.shape[1:])
    own = {"q": grouped[:, :queries], "k": grouped[:, queries], "v": grouped[:, queries + 1]}[part]
    return own.reshape(-1, *tensor.shape[1:])


def adapter(linear: str, matrix: str) -> str:
    """Megatron's name of an adapter's matrix. `linear` is of LINEAR's values, `matrix` is "in" (A) or "out" (B)."""
    return f"{LAYERS}{linear}.adapter.linear_{matrix}.weight"
