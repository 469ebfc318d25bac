"""Let a training wait for its turn. Python imports this module first: bench/at_once.py puts its folder in PYTHONPATH.

In: TURN_PORT, the port of the job's first rank; a recipe that is imported. Out: NeMo's recipe with the callback of
take_turn.py.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

RECIPE = "runtime.engines.nemo.recipe"


class WhenImported:
    """Import hook: wraps the recipe's `build` when the training imports it."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == RECIPE else None
        if spec and spec.loader:
            load = spec.loader.exec_module

            def load_and_wrap(module: ModuleType) -> None:
                load(module)
                _wrap(module)

            spec.loader.exec_module = load_and_wrap  # type: ignore[method-assign]
        return spec


def _wrap(recipe: Any) -> None:
    build = recipe.build

    def build_and_wait(*args: Any) -> Any:
        import nemo_run as run
        from take_turn import Turn

        built = build(*args)
        # the first, so that no other callback times the wait as a part of the first step
        built.trainer.callbacks = [run.Config(Turn), *(built.trainer.callbacks or [])]
        return built

    recipe.build = build_and_wait


# the script takes a random port when it starts; of many jobs at once, two could take the same
os.environ["FTGEN_MASTER_PORT"] = os.environ["TURN_PORT"]
sys.meta_path.insert(0, WhenImported)
