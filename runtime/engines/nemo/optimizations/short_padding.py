"""Cut the padding of each pack into several short sequences.

In: a recipe with packed data. Out: the recipe, with a data step that cuts the padding.

For attention and rotary embedding, the padding at the end of a pack is one more sequence. In a pack with few
examples, it is much longer than any example. With padded cu_seqlens, the kernels then treat every sequence as if it
were that long. This optimization cuts the padding into sequences that are no longer than the longest example.
"""

from pathlib import Path
from typing import Any

import torch

from runtime.engines import padding
from runtime.engines.nemo.optimizations import needs
from runtime.engines.nemo.optimizations.packs import ChangedStep, cu_seqlens, ends_of


def missing(recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing_in_config(recipe, "data_step_fn") or needs.missing(
        "nemo.collections.llm.gpt.data.packed_sequence:PackedSequenceSpecs.packed_metadata_path"
    )


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Make the recipe's data step cut the padding. Requires packed data and CP = 1."""
    install(recipe.data, recipe.model.config)


def install(data: Any, config: Any) -> None:
    """Change the data step of a GPTConfig. The packs' metadata has the length of the longest example."""
    limit = padding.longest_sequence(Path(data.packed_sequence_specs.packed_metadata_path))
    config.data_step_fn = ChangedStep(config.data_step_fn, lambda batch: cut_padding(batch, limit))


def cut_padding(batch: dict[str, Any], longest: int) -> dict[str, Any]:
    """The batch (one row) with sequences cut to at most `longest` tokens. No example is longer: only padding is cut.

    cu_seqlens [1, n] always gets as many entries as the longest possible padding needs, because CUDA graphs need a
    fixed shape.
    """
    cut = padding.cut(ends_of(batch)[0], longest)
    return batch | cu_seqlens(cut) | {"max_seqlen": torch.tensor([[longest]], dtype=torch.int32)}
