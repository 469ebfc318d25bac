"""Use Transformer Engine's op fuser everywhere, which rounds differently. In: a recipe. Out: the recipe, changed."""

from typing import Any


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch it on."""
    recipe.model.config.use_transformer_engine_op_fuser = True
