"""A peer: torchtune, with its packed attention (FlexAttention), its chunked loss and its torch.compile of each layer.

In: a plan, weights. Out: a model that gives the loss of a micro-batch.

As in the peer of Transformers, queries, keys and values share the first matrix of a layer's adapter, as NeMo's do.
"""

from typing import Any

import torch
from weights import Weights
from work import NO_LOSS, Batch, Plan

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}


class TorchtunePeer:
    """The model."""

    def __init__(self, plan: Plan, compiles: bool, weights: Weights, device: str, dtype: torch.dtype) -> None:
        from torchtune.modules.loss import CEWithChunkedOutputLoss

        self.compiles = compiles
        self.model = _model(plan, device, dtype)
        with torch.no_grad():
            _fill(self.model, plan, weights)
        self.parameters = _trainable(self.model)
        self.compute_loss = CEWithChunkedOutputLoss(ignore_index=NO_LOSS)
        self.model.set_num_output_chunks(self.compute_loss.num_output_chunks)
        self.masks: dict[str, Any] = {}

    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean over the tokens that have a loss."""
        chunks = self.model(batch.tokens, mask=self._mask(batch), input_pos=batch.positions)
        return self.compute_loss(chunks, batch.labels)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """What the last layer says of each token: [1, tokens, hidden]."""
        found = self.model.tok_embeddings(batch.tokens)
        for layer in self.model.layers:
            found = layer(found, mask=self._mask(batch), input_pos=batch.positions)
        return self.model.norm(found)

    def finish(self) -> None:
        """Compile each layer and the loss, as torchtune.training.compile_model and compile_loss do.

        They cannot be imported beside a torchao that PEFT accepts: torchtune.training wants an old name of torchao's.
        """
        if self.compiles:
            for layer in self.model.layers:
                layer.compile()
            self.compute_loss.compute_cross_entropy = torch.compile(self.compute_loss.compute_cross_entropy)

    def prepare(self, batches: list[Batch]) -> None:
        """Make the masks before the first step: torchtune's data loader makes them beside the training."""
        for batch in batches:
            self._mask(batch)

    def _mask(self, batch: Batch) -> Any:
        from torchtune.modules.attention_utils import packed_block_causal_mask

        if batch.sha256 not in self.masks:
            lengths = batch.ends.diff()
            self.masks[batch.sha256] = packed_block_causal_mask([lengths[lengths > 0].cpu()])
        return self.masks[batch.sha256]


def _model(plan: Plan, device: str, dtype: torch.dtype) -> Any:
    from torchtune.models.llama3 import lora_llama3

    model = plan["model"]
    torch.set_default_dtype(dtype)
    with torch.device(device):
        made = lora_llama3(
            list(PROJECTIONS.values()),
            vocab_size=model["vocab_size"],
            num_layers=model["num_layers"],
            num_heads=model["num_attention_heads"],
            num_kv_heads=model["num_query_groups"],
            embed_dim=model["hidden_size"],
            max_seq_len=model["max_position_embeddings"],
            intermediate_dim=model["ffn_hidden_size"],
            norm_eps=1e-5,
            rope_base=int(model["rope_theta"]),
            lora_rank=plan["lora"]["rank"],
            lora_alpha=plan["lora"]["alpha"],
        )
    torch.set_default_dtype(torch.float32)
    return made.train()


def _fill(model: Any, plan: Plan, weights: Weights) -> None:
    """Write all weights. torchtune has another order of the rows of queries and keys; its own converter knows it."""
    from torchtune.models.convert_weights import hf_to_tune, tune_to_hf

    shape = plan["model"]
    heads = {"num_heads": shape["num_attention_heads"], "num_kv_heads": shape["num_query_groups"]}
    own = {name: weight for name, weight in model.named_parameters() if ".lora_" not in name}
    for name, weight in own.items():
        like = torch.empty_like(weight)
        ((theirs, _),) = tune_to_hf({name: like}, **heads, dim=shape["hidden_size"], head_dim=shape["head_size"]).items()
        weights.fill(theirs, like)
        weight.copy_(hf_to_tune({theirs: like}, **heads, dim=shape["hidden_size"], head_dim=shape["head_size"])[name])
    for number, layer in enumerate(model.layers):
        shared = layer.attn.q_proj.lora_a
        weights.fill_adapter(number, "A", shared.weight)
        for key, name in PROJECTIONS.items():
            projection = getattr(layer.attn, name)
            projection.lora_a = shared
            like = torch.empty_like(projection.lora_b.weight)
            weights.fill_adapter(number, key, like)
            theirs = f"model.layers.{number}.self_attn.{name}.weight"
            made = hf_to_tune({theirs: like}, **heads, dim=plan["lora"]["rank"], head_dim=shape["head_size"])
            projection.lora_b.weight.copy_(made.popitem()[1])


def _trainable(model: Any) -> list[torch.Tensor]:
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    set_trainable_params(model, get_adapter_params(model))
    return [weight for weight in model.parameters() if weight.requires_grad]
