"""Make older and newer versions of NeMo and Megatron-Core work together, and with this runtime.

In: the installed packages. Out: stand-ins for what NeMo asks of Megatron-Core and Megatron-Core no longer has.

Each function looks at the package that is installed, not at its version: images have versions between two releases.
"""

import functools
import inspect
import sys
from multiprocessing.pool import ThreadPool
from types import ModuleType, SimpleNamespace
from typing import Any

from runtime.engines import installed

# The reader of checkpoints in zarr, which Megatron-Core has up to 0.15. NeMo 2.7 cannot be imported without it. No
# checkpoint of ftgen is in zarr.
ZARR_READER = "megatron.core.dist_checkpointing.strategies.tensorstore"
# Arguments that NeMo passes to get_megatron_optimizer, and their values if nothing is asked for. Megatron-Core 0.16 has
# config_overrides in their place. Without it, it exempts biases and norms from weight decay, as it did before.
NOTHING_ASKED = {"no_weight_decay_cond": None, "scale_lr_cond": None, "lr_mult": 1.0}

# Modules in which NeMo up to 2.4 reads its indices of examples, in a pool of forked processes. The pool ends its processes
# by SIGTERM. They have inherited Lightning's handler, which ignores it, so that the training waits for ever.
INDICES = ("nemo.collections.llm.gpt.data.utils", "nemo.collections.nlp.data.language_modeling.text_memmap_dataset")


def before_imports() -> None:
    """Stand in for modules. Call it before NeMo is imported."""
    if not source(ZARR_READER):
        stand_in(ZARR_READER, TensorStoreLoadShardedStrategy=None)


def after_imports() -> None:
    """Change functions of NeMo and Megatron-Core. Call it once, after NeMo was imported."""
    from megatron.core import optimizer

    known = inspect.signature(optimizer.get_megatron_optimizer).parameters
    if gone := NOTHING_ASKED.keys() - known.keys():
        optimizer.get_megatron_optimizer = _without(gone, optimizer.get_megatron_optimizer)
    for module in filter(None, map(sys.modules.get, INDICES)):
        if not hasattr(module, "safe_map"):  # which has its own way to end its processes
            module.mp = SimpleNamespace(get_context=lambda _method: SimpleNamespace(Pool=ThreadPool))  # type: ignore[attr-defined]


def source(module: str) -> str:
    """The text of a module of megatron.core, without importing it; "" if there is no such module."""
    inner = module.removeprefix("megatron.core.").split(".")
    core = installed.folder("megatron.core")
    file = core.joinpath(*inner).with_suffix(".py") if core else None
    return file.read_text(encoding="utf-8") if file and file.is_file() else ""


def stand_in(module: str, **names: Any) -> None:
    """Make an object with these names importable as the module, unless it is imported already."""
    instead = ModuleType(module)
    vars(instead).update(names)
    sys.modules.setdefault(module, instead)


def _without(gone: set[str], function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nothing = {name for name in gone & kwargs.keys() if kwargs[name] == NOTHING_ASKED[name]}
        return function(*args, **{name: value for name, value in kwargs.items() if name not in nothing})

    return call
