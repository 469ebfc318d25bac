"""A peer: Transformers with PEFT; with Liger kernels, torch.compile and torchao's float8 where the variant says so.

In: a plan, a variant, weights. Out: a model that gives the loss of a micro-batch.

As their documentation has it: attention gets the boundaries of the packed examples by Transformers' own names
(cu_seq_lens_q, max_length_q) and is registered as an attention interface; Liger is applied before the model is built; each
decoder layer is compiled by itself (PyTorch's "regional compilation"); float8 replaces the frozen linear layers, not the
LM head, scaled by tensor, which torchao calls its fastest recipe.

One thing is not PEFT's own: queries, keys and values share the first matrix of a layer's adapter. NeMo's adapter of
linear_qkv has one. With three, the peer would train more parameters, so other work.
"""

from typing import Any, NamedTuple

import attention
import torch
from weights import Weights
from work import Batch, Plan

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}


class Variant(NamedTuple):
    """What is switched on."""

    liger: str = ""  # "all" kernels, or the fused "loss" alone
    compiles: bool = False
    fp8: bool = False
    sdpa: bool = False  # PyTorch's own attention with a mask made of the positions, in place of variable lengths


class HfPeer:
    """The model."""

    def __init__(self, plan: Plan, variant: Variant, weights: Weights, device: str, dtype: torch.dtype) -> None:
        self.variant = variant
        self.model = _adapted(_base(plan, variant, weights, device, dtype), plan, weights)
        self.layers = self.model.base_model.model.model.layers
        self.parameters = [weight for weight in self.model.parameters() if weight.requires_grad]

    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean over the tokens that have a loss."""
        output = self.model(**self._inputs(batch), labels=batch.labels, shift_labels=batch.labels)
        return output.loss

    def hidden(self, batch: Batch) -> torch.Tensor:
        """What the last layer says of each token: [1, tokens, hidden]."""
        return self.model.base_model.model.model(**self._inputs(batch)).last_hidden_state

    def finish(self) -> None:
        """Switch on what changes the layers of the model."""
        if self.variant.fp8:
            _to_float8(self.model)
        if self.variant.compiles:
            for layer in self.layers:
                layer.compile()

    def prepare(self, batches: list[Batch]) -> None:
        """Nothing: the batches have all that the model needs."""

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs = {"input_ids": batch.tokens, "position_ids": batch.positions}
        if self.variant.sdpa:
            return inputs
        ends, longest = batch.ends, batch.longest
        return inputs | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _attend(
    _module: Any,
    query: Any,
    key: Any,
    value: Any,
    _mask: Any,
    scaling: float,
    cu_seq_lens_q: Any,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: query, key and value are [1, heads, tokens, size]."""
    query, key, value = (each[0].transpose(0, 1).contiguous() for each in (query, key, value))
    return attention.attend(query, key, value, cu_seq_lens_q, max_length_q, scaling)[None], None


def _base(plan: Plan, variant: Variant, weights: Weights, device: str, dtype: torch.dtype) -> Any:
    from transformers import AttentionInterface, LlamaForCausalLM
    from transformers.modeling_utils import no_init_weights

    AttentionInterface.register("packed", _attend)
    if variant.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        every = variant.liger == "all"
        apply_liger_kernel_to_llama(rope=every, rms_norm=every, swiglu=every, fused_linear_cross_entropy=True)
    if device == "cuda" and not variant.sdpa:
        attention.choose()
    torch.set_default_dtype(dtype)
    with torch.device(device), no_init_weights():
        model = LlamaForCausalLM(_config(plan, "sdpa" if variant.sdpa else "packed"))
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weights.fill(name, weight)
    return model.train()


def _config(plan: Plan, implementation: str) -> Any:
    from transformers import LlamaConfig

    model = plan["model"]
    return LlamaConfig(
        vocab_size=model["vocab_size"],
        hidden_size=model["hidden_size"],
        intermediate_size=model["ffn_hidden_size"],
        num_hidden_layers=model["num_layers"],
        num_attention_heads=model["num_attention_heads"],
        num_key_value_heads=model["num_query_groups"],
        head_dim=model["head_size"],
        max_position_embeddings=model["max_position_embeddings"],
        rope_theta=model["rope_theta"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation=implementation,
    )


def _adapted(model: Any, plan: Plan, weights: Weights) -> Any:
    """The model with adapters of its own type: as Megatron-Core's, they have float32 copies in the optimizer alone."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=plan["lora"]["rank"],
        lora_alpha=plan["lora"]["alpha"],
        target_modules=list(PROJECTIONS.values()),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for number, layer in enumerate(adapted.base_model.model.model.layers):
            projections = {key: getattr(layer.self_attn, name) for key, name in PROJECTIONS.items()}
            shared = projections["q"].lora_A["default"].weight
            weights.fill_adapter(number, "A", shared)
            for key, projection in projections.items():
                projection.lora_A["default"].weight = shared
                weights.fill_adapter(number, key, projection.lora_B["default"].weight)
    return adapted


def _to_float8(model: Any) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def is_frozen(_module: Any, name: str) -> bool:
        return "lm_head" not in name and "lora_" not in name

    emulate = not torch.cuda.is_available()
    convert_to_float8_training(model, config=Float8LinearConfig(emulate=emulate), module_filter_fn=is_frozen)
