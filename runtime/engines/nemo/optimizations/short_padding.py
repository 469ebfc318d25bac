"""Cut the padding of each pack into several short sequences.

In: a recipe with packed data. Out: the recipe, with a data step that cuts.

To attention and rotary embedding, the padding at the end of a pack is one more sequence, and it can be as long as the emptiest
pack leaves it. With padded cu_seqlens, the kernels then treat every sequence as if it were that long. This cuts the padding
into sequences that are no longer than the longest example.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from runtime.engines.nemo.optimizations.packs import ChangedStep, cu_seqlens, ends_of

MULTIPLE = 64  # tokens that an attention kernel works on at a time: the longest sequence is rounded up to a multiple


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Make the recipe's data step cut the padding. For packed data and one context-parallel rank."""
    install(recipe.data, recipe.model.config)


def install(data: Any, config: Any) -> None:
    """Change a GPTConfig's data step; the length of the longest example is read from the packs' metadata."""
    metadata = json.loads(Path(data.packed_sequence_specs.packed_metadata_path).read_text())
    longest = max(split["dataset_max_seqlen"] for split in metadata)
    limit = -(-longest // MULTIPLE) * MULTIPLE
    config.data_step_fn = ChangedStep(config.data_step_fn, lambda batch: cut_padding(batch, limit))


def cut_padding(batch: dict[str, Any], longest: int) -> dict[str, Any]:
    """A batch of one row without sequences of more than `longest` tokens; no example is that long, so only padding is cut.

    cu_seqlens [1, n] always grows by as much as the longest possible padding needs: CUDA graphs need one shape.
    """
    ends = ends_of(batch)[0]
    cut = [0]
    for begin, end in pairwise(ends):
        cut += [*range(begin + longest, end, longest), end]
    count = len(ends) + ends[-1] // longest
    cut += [ends[-1]] * (count - len(cut))
    return batch | cu_seqlens(cut) | {"max_seqlen": torch.tensor([[longest]], dtype=torch.int32)}
