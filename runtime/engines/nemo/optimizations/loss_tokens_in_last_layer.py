"""Compute what follows the attention of the last layer only for tokens that have a loss.

In: a recipe in which loss_tokens_only is on. Out: the recipe, with steps that prepare the model's last layer.

The attention of the last layer needs the keys and values of all tokens. After it, each token goes its own way, and only
those with a loss go on to the LM head: the others' results are not read, and their gradients are zero. Here the output of
the attention and the residual are cut to the rows with a loss before the layer's output projection.

The number of rows changes from one micro-batch to the next, so this layer is no CUDA graph. In FP8, the scales of the inputs
of its output projection and MLP come from the rows with a loss alone.
"""

import functools
from typing import Any

import torch

from runtime.engines import loss_rows
from runtime.engines.nemo.optimizations import loss_tokens_only, needs


def missing(recipe: Any, plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    graphs = ("megatron.core.transformer.cuda_graphs:_determine_if_first_last_layer_of_this_vp_chunk",)
    return loss_tokens_only.missing(recipe, plan) or needs.missing(
        "megatron.core.fusions.fused_bias_dropout:get_bias_dropout_add",
        "megatron.core.transformer.transformer_layer:TransformerLayer._forward_mlp",
        *(graphs if plan["optimizations"]["cuda_graphs"] else ()),
    )


def apply(recipe: Any, plan: dict[str, Any]) -> None:
    """Make the recipe's forward step prepare the last layer. Requires TP = PP = CP = 1."""
    recipe.model.config.forward_step_fn = forward_step
    if plan["optimizations"]["cuda_graphs"]:
        from megatron.core.transformer import cuda_graphs

        stock = cuda_graphs._determine_if_first_last_layer_of_this_vp_chunk
        cuda_graphs._determine_if_first_last_layer_of_this_vp_chunk = _with_last_graph_before(stock)


def forward_step(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """NeMo's forward step, with the last layer prepared before the first one."""
    prepare(loss_rows.gpt_of(model))
    return loss_tokens_only.forward_step(model, batch)


def prepare(gpt: Any) -> None:
    """Make the last layer of a GPTModel return [rows, 1, hidden], for the rows of `loss_rows.give`. Does it once."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    if gpt.rows_are_picked:
        return
    gpt.rows_are_picked = True
    layer = gpt.decoder.layers[-1]
    if hasattr(layer, "cudagraph_manager"):
        del layer.cudagraph_manager

    def picked_attention(_projection: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return loss_rows.pick(inputs[0], gpt.loss_rows), *inputs[1:]

    def add_picked_residual(*args: Any) -> Any:
        add = get_bias_dropout_add(*args)

        @functools.wraps(add)
        def added(output: Any, residual: torch.Tensor, probability: float) -> Any:
            return add(output, loss_rows.pick(residual, gpt.loss_rows), probability)

        return added

    layer.self_attention.linear_proj.register_forward_pre_hook(picked_attention)
    layer.self_attn_bda = add_picked_residual  # not that of fused_residual_add: the norm's input is no longer the residual


def _with_last_graph_before(stock: Any) -> Any:
    """Megatron-Core's answer whether a layer is the first and the last of the graphs: the last layer is none of them."""

    @functools.wraps(stock)
    def is_first_and_last(layer: Any) -> tuple[bool, bool]:
        first, _ = stock(layer)
        return first, layer.layer_number == layer.config.num_layers - 1

    return is_first_and_last
