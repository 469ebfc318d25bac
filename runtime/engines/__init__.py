"""The training frameworks, one folder each, with the same file names in each.

In: a plan, weights, data. Out: step lines and checkpoints. Start with `nemo/train.py`.

A plan names its engine, and a script carries only the folder of that engine. What the rest of the runtime uses of it:

    convert.convert(plan)           convert the checkpoint; exit code
    train.train(plan)               train on this rank; exit code
    packages.found()                what is installed, as a text
    packages.missing(models, gpu=)  a sentence for each thing that is missing

What both engines need is in the files beside these folders, and in `runtime/weights` and `runtime/data`.
"""

from importlib import import_module
from typing import Any


def module(plan: dict[str, Any], name: str) -> Any:
    """A module of the plan's engine, such as "convert"."""
    return import_module(f"runtime.engines.{plan['engine']}.{name}")
