"""Cut the padding of each pack into several short sequences. See runtime/engines/padding.py.

In: a recipe with packed data. Out: the recipe, which cuts the padding in each batch.
"""

from pathlib import Path
from typing import Any

import torch

from runtime.engines import padding
from runtime.engines.megatron_bridge.recipe import Batch, Recipe


def missing(_recipe: Recipe, _plan: dict[str, Any]) -> str:
    """Nothing: all versions that can train have what it needs."""
    return ""


def apply(recipe: Recipe, _plan: dict[str, Any]) -> None:
    """Cut the padding of each batch. Requires packed data and CP = 1."""
    longest = padding.longest_sequence(Path(recipe.config.dataset.offline_packing_specs.packed_metadata_path))
    recipe.changes.append(lambda _model, batch: cut_padding(batch, longest))


def cut_padding(batch: Batch, longest: int) -> Batch:
    """The batch (one row) with sequences cut to at most `longest` tokens.

    Megatron-Bridge's cu_seqlens [1, n] end with repeated ends, as many as the other rows of the global batch need.
    """
    ends = batch["cu_seqlens_q"][0].tolist()
    while len(ends) > 2 and ends[-1] == ends[-2]:
        ends.pop()
    cut = torch.tensor([padding.cut(ends, longest)], dtype=torch.int32)
    limit = torch.tensor([[longest]], dtype=torch.int32)
    return batch | {"cu_seqlens_q": cut, "cu_seqlens_kv": cut, "max_seqlen_q": limit, "max_seqlen_kv": limit}
