"""Weights of a peer's model, by the names of Hugging Face: those of a checkpoint, or random ones, the same for every peer.

In: a folder with a Hugging Face checkpoint, or None. Out: one tensor after another.

Random weights are drawn on the device, each from a seed that its name gives, with the distribution of ftgen's own random
checkpoints (runtime/weights/random_llama.py). So no peer reads 16 GB, and all peers have the same first loss.
"""

from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from runtime.weights.random_llama import STD

MATRICES = "Aqkv"  # of a layer's adapter: the first one, and the second one's rows for queries, keys and values


class Weights:
    """Gives the weight of a name."""

    def __init__(self, folder: Path | None, adapters: dict[str, Any] | None) -> None:
        self.adapters = adapters  # "0.A": [rank, hidden], "0.q": [rows, rank], …; None: random first matrices, zeros
        self.files: dict[str, Any] = {}
        if folder:
            from safetensors.torch import load_file

            for file in sorted(folder.glob("*.safetensors")):
                self.files |= load_file(file)

    def fill(self, name: str, weight: torch.Tensor) -> None:
        """Write a weight of the model in place."""
        if self.files:
            weight.copy_(self.files[name])
        else:
            weight.normal_(1.0 if weight.dim() == 1 else 0.0, STD, generator=_generator(name, weight.device))

    def fill_adapter(self, layer: int, matrix: str, weight: torch.Tensor) -> None:
        """Write a matrix of a layer's adapter in place: one of MATRICES."""
        if self.adapters:
            weight.copy_(torch.from_numpy(self.adapters[f"{layer}.{matrix}"]))
        elif matrix == "A":
            deviation = (2 / sum(weight.shape)) ** 0.5  # Xavier's, as NeMo draws it
            weight.normal_(0.0, deviation, generator=_generator(f"{layer}.A", weight.device))
        else:
            weight.zero_()


def _generator(name: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(crc32(name.encode()))
