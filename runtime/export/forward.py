"""Compute the logits of a trained model from its distributed checkpoint, in float32, without a model.

In: the tensors of the checkpoint, token ids. Out: logits [tokens, vocabulary].

This is the independent path that an export is checked with. It shares neither names nor cuts of fused tensors with the
export: it uses Megatron's tensors as Megatron itself does. It adds the adapters to the output of a layer, as the
training did, or merges them into its fused weights. It reads one layer at a time.
"""

import math
from typing import TYPE_CHECKING, Any

from runtime.export.trained import Trained

if TYPE_CHECKING:
    import torch

# Of the rotary frequencies of Llama 3.1 and later, as in NeMo's Llama31Config.
LOW, HIGH, OLD_CONTEXT = 1.0, 4.0, 8192


def logits(trained: Trained, tokens: list[int], epsilon: float, merged: "torch.dtype | None" = None) -> "torch.Tensor":
    """Logits of one sequence. `epsilon` is that of the norms (rms_norm_eps).

    With `merged`, adapters are merged into the weights, which are then rounded to this type.
    """
    import torch

    model = trained.model
    with torch.no_grad():
        hidden = trained.weights.read("embedding.word_embeddings.weight")[tokens].float()
        rotation = _rotation(model, len(tokens))
        for layer in range(model["num_layers"]):
            hidden = _Layer(trained, layer, epsilon, merged).forward(hidden, rotation)
        hidden = _norm(hidden, trained.weights.read("decoder.final_layernorm.weight"), epsilon)
        tied = model["tied_embeddings"]
        head = trained.weights.read("embedding.word_embeddings.weight" if tied else "output_layer.weight")
        rows = head[: model["vocab_size"]].split(1 << 14)  # a part at a time, because it is cast
        return torch.cat([hidden @ part.float().T for part in rows], dim=1)


class _Layer:
    """One transformer layer of Megatron."""

    def __init__(self, trained: Trained, layer: int, epsilon: float, merged: "torch.dtype | None") -> None:
        self.trained, self.layer, self.epsilon, self.merged = trained, layer, epsilon, merged

    def forward(self, hidden: "torch.Tensor", rotation: tuple["torch.Tensor", "torch.Tensor"]) -> "torch.Tensor":
        """[tokens, hidden] to [tokens, hidden]."""
        import torch

        normed = _norm(hidden, self._read("self_attention.linear_qkv.layer_norm_weight"), self.epsilon)
        hidden = hidden + self._linear("self_attention.linear_proj", self._attend(normed, rotation))
        normed = _norm(hidden, self._read("mlp.linear_fc1.layer_norm_weight"), self.epsilon)
        gate, up = self._linear("mlp.linear_fc1", normed).chunk(2, dim=-1)
        return hidden + self._linear("mlp.linear_fc2", torch.nn.functional.silu(gate) * up)

    def _attend(self, normed: "torch.Tensor", rotation: tuple["torch.Tensor", "torch.Tensor"]) -> "torch.Tensor":
        import torch

        model = self.trained.model
        groups, size, count = model["num_query_groups"], model["head_size"], len(normed)
        fused = self._linear("self_attention.linear_qkv", normed).view(count, groups, -1, size)
        queries, keys, values = fused[:, :, :-2], fused[:, :, -2:-1], fused[:, :, -1]
        queries, keys = _rotate(queries, rotation), _rotate(keys, rotation)[:, :, 0]
        scores = torch.einsum("qghd,kgd->ghqk", queries, keys) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), -math.inf)
        return torch.einsum("ghqk,kgd->qghd", scores.softmax(-1), values).reshape(count, -1)

    def _linear(self, name: str, x: "torch.Tensor") -> "torch.Tensor":
        """The layer's output, with its bias and with that of its adapter."""
        weight, y = self._read(f"{name}.weight").float(), 0.0
        if f"decoder.layers.{name}.bias" in self.trained.weights.names:
            y = self._read(f"{name}.bias").float()
        adapters = self.trained.adapters
        if adapters and f"decoder.layers.{name}.adapter.linear_in.weight" in adapters.names:
            a = adapters.read(f"decoder.layers.{name}.adapter.linear_in.weight", self.layer).float()
            b = adapters.read(f"decoder.layers.{name}.adapter.linear_out.weight", self.layer).float()
            if self.merged:
                weight = (weight + self.trained.scale * (b @ a)).to(self.merged).float()
            else:
                y = y + (x @ a.T) @ b.T * self.trained.scale
        return x @ weight.T + y

    def _read(self, name: str) -> "torch.Tensor":
        return self.trained.weights.read(f"decoder.layers.{name}", self.layer)


def _norm(x: "torch.Tensor", weight: "torch.Tensor", epsilon: float) -> "torch.Tensor":
    """RMSNorm."""
    import torch

    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight.float()


def _rotation(model: dict[str, Any], count: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Cosines and sines of the rotary angles, each [tokens, 1, 1, head_size]."""
    import torch

    size = model["head_size"]
    frequencies = model["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    if factor := model["rope_scaling_factor"]:
        turns = OLD_CONTEXT * frequencies / (2 * math.pi)
        smooth = ((turns - LOW) / (HIGH - LOW)).clamp(0, 1)
        frequencies = frequencies / factor * (1 - smooth) + frequencies * smooth
    angles = torch.outer(torch.arange(count, dtype=torch.float64), frequencies).repeat(1, 2)[:, None, None]
    return angles.cos().float(), angles.sin().float()


def _rotate(x: "torch.Tensor", rotation: tuple["torch.Tensor", "torch.Tensor"]) -> "torch.Tensor":
    import torch

    left, right = x.chunk(2, dim=-1)
    return x * rotation[0] + torch.cat([-right, left], dim=-1) * rotation[1]
