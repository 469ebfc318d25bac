"""Megatron-Core's attention of packed sequences, its own and with fused_rotary and short_attention. In: TRITON_INTERPRET=1.

Out: JSON, the largest differences of the output and of the gradients of input and weights, in float32 on the CPU: first with
fused_rotary, then with both.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig

from runtime.engines import no_gpu, packed_attention
from runtime.engines.nemo.optimizations import fused_rotary, short_attention

ENDS = [0, 3, 10, 11, 40, 40]
HIDDEN, HEADS, GROUPS = 64, 4, 2


def main() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    no_gpu.stand_in()
    packed_attention.install()
    attention = layer()
    stock = outcome(attention)
    assert not fused_rotary.missing(None, {})
    fused_rotary.apply(None, {})
    fused = outcome(attention)
    assert attention.rotation is not None  # the kernels were used
    DotProductAttention.forward = short_attention.with_own_kernels(refuse)  # on a GPU, TEDotProductAttention
    both = outcome(attention)
    print(json.dumps([[float((a - b).abs().max()) for a, b in zip(stock, other, strict=True)] for other in (fused, both)]))


def refuse(*_args: object, **_kwargs: object) -> None:
    raise AssertionError("the kernels were not used")


def layer() -> SelfAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        use_cpu_initialization=True,
        apply_rope_fusion=False,
        add_bias_linear=False,
        attention_dropout=0.0,
    )
    parts = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=DotProductAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=IdentityOp,  # as in Megatron-Core's specs of a layer
        k_layernorm=IdentityOp,
    )
    return SelfAttention(config, parts, layer_number=1, attn_mask_type=AttnMaskType.causal)


def outcome(attention: SelfAttention) -> list[torch.Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(ENDS[-1], 1, HIDDEN, requires_grad=True)
    ends = torch.tensor(ENDS, dtype=torch.int32)
    packs = PackedSeqParams(cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=29, max_seqlen_kv=29, qkv_format="thd")
    angles = RotaryEmbedding(HIDDEN // HEADS, 1.0, use_cpu_initialization=True)(ENDS[-1])
    attention.zero_grad()
    out, _ = attention(hidden, None, rotary_pos_emb=angles, packed_seq_params=packs)
    out.backward(torch.randn(out.shape))
    assert hidden.grad is not None
    return [
        out.detach(),
        hidden.grad,
        *(weight.grad.clone() for weight in attention.parameters() if weight.grad is not None),
    ]


main()
