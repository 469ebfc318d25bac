"""Run each layer as a local CUDA graph of Megatron-Core. No spec can ask for it: it is here to be measured.

In: a recipe. Out: the recipe with graphs on.

Megatron-Bridge 0.6.2 refuses local graphs of single layers in a training, but not those of inference, which are the same
graphs of Megatron-Core.
"""

import os
from typing import Any

from runtime.engines.megatron_bridge.recipe import Recipe


def missing(_recipe: Recipe, _plan: dict[str, Any]) -> str:
    """Nothing that could be found out without a GPU."""
    return ""


def apply(recipe: Recipe, _plan: dict[str, Any]) -> None:
    """Switch local graphs on."""
    if "expandable_segments" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        os.environ.pop("PYTORCH_CUDA_ALLOC_CONF")  # Megatron-Core allows no graphs with it
    config = recipe.config
    config.env_vars = {name: value for name, value in config.env_vars.items() if name != "PYTORCH_CUDA_ALLOC_CONF"}
    config.model.cuda_graph_impl, config.model.cuda_graph_scope = "local", None
    config.model.inference_cuda_graph_scope = "layer"
    config.rng.te_rng_tracker = config.model.use_te_rng_tracker = True
    config.dataset.offline_packing_specs.pad_cu_seqlens = True
