"""Write LoRA adapters in the format of PEFT.

In: A and B of each adapted weight. Out: adapter_config.json and adapter_model.safetensors.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.weights import shards
from runtime.weights.shards import Entry

if TYPE_CHECKING:
    import torch

FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # PEFT's wrapper of the model
Pair = tuple["torch.Tensor", "torch.Tensor"]


def write(
    folder: Path, modules: list[str], pair_of: Callable[[str], Pair], lora: dict[str, Any], base: str, revision: str | None
) -> None:
    """Write both files.

    `modules` are names of linear layers such as model.layers.0.self_attn.q_proj; `pair_of` gives A [rank, in] and
    B [out, rank] of each. `lora` is the plan's; `base` and `revision` say where the base model is.
    """
    entries = {}
    for module in modules:
        for matrix, tensor in zip("AB", pair_of(module), strict=True):
            entries[tensor_name(module, matrix)] = Entry(shards.header_name(tensor.dtype), tuple(tensor.shape), FILE)
    shards.write(folder, entries, lambda name: pair_of(module_of(name))[".lora_B." in name], index=False)
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "peft_type": "LORA",
        "r": lora["rank"],
        "revision": revision,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "task_type": "CAUSAL_LM",
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def tensor_name(module: str, matrix: str) -> str:
    """PEFT's name of matrix "A" or "B" of a linear layer."""
    return f"{PREFIX}{module}.lora_{matrix}.weight"


def module_of(name: str) -> str:
    """The linear layer of a name of PEFT."""
    return name.removeprefix(PREFIX).partition(".lora_")[0]
