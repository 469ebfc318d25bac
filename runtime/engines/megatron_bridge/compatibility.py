"""Make Megatron-Bridge importable and usable as pip installs it.

In: the installed packages. Out: stand-ins for what they ask for and do not have.

Written for Megatron-Bridge 0.6.2 with Megatron-Core 0.19.2. Each function looks at what is there, not at a version.
"""

import logging
import os
import sys
import typing
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from runtime.engines import no_gpu, wgrad

# The only module of Megatron-Bridge that imports Transformer Engine without asking whether it is there.
IMPORTS_TRANSFORMER_ENGINE = "megatron.bridge.peft.lora_layers"


def before_imports(plan: dict[str, Any]) -> None:
    """Stand in for modules. Call it before Megatron-Bridge is imported."""
    # Its models ask for the fusion as soon as Transformer Engine is there, and then need APEX's extension for the LM head.
    if find_spec(wgrad.EXTENSION) is None:
        wgrad.stand_in_for_apex()
    if not hasattr(typing, "override"):  # Python 3.11
        typing.override = no_gpu.decorates_nothing  # type: ignore[attr-defined]
    if plan["gpu"]["name"] == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # with more threads, the tiny model is slower
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # it cannot compile functions that call the stand-ins of torch.cuda
    # It writes the traceback of each optional import that fails, which a reader of the log takes for that of a failure.
    logger = logging.getLogger("megatron.bridge.utils.import_utils")
    logger.addFilter(lambda record: record.levelno >= logging.WARNING)
    if find_spec("transformer_engine") is None:
        sys.meta_path.insert(0, _Finder)


def after_imports() -> None:
    """Change functions of Megatron-Bridge. Call it once, after it was imported."""
    from megatron.bridge.training import initialize

    # It runs `make` in Megatron-Core's folder. The package has what that makes, and no Makefile: the job would end.
    initialize.compile_helpers = no_gpu.nothing


class _Finder:
    """Import hook: gives a stand-in for Transformer Engine to one module, while that module is executed."""

    @staticmethod
    def find_spec(name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != IMPORTS_TRANSFORMER_ENGINE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and spec.loader:
            spec.loader.exec_module = _with_stand_in(spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _with_stand_in(execute: Any) -> Any:
    def exec_module(module: ModuleType) -> None:
        # what the module also imports must find out for itself that Transformer Engine is not there
        import megatron.bridge.peft.adapter_wrapper
        import megatron.bridge.peft.lora_merge
        import megatron.core.transformer.moe.moe_utils  # noqa: F401

        engine, torch_part = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
        layers = {name: type(name, (), {}) for name in ("Linear", "LayerNormLinear")}
        vars(torch_part).update(layers, ops=SimpleNamespace(Sequential=type("Sequential", (), {})))
        vars(engine).update(pytorch=torch_part)
        sys.modules.update({"transformer_engine": engine, "transformer_engine.pytorch": torch_part})
        try:
            execute(module)
        finally:
            del sys.modules["transformer_engine"], sys.modules["transformer_engine.pytorch"]

    return exec_module
