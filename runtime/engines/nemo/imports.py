"""Import NeMo faster: packages that a fine-tune does not use are imported only when something uses them.

In: a process that has not imported NeMo. Out: an import hook for the packages in `DEFERRED`.

NeMo and Megatron-Core import many packages that a training never calls: clients of clouds, loggers, quantization. For
a package in `DEFERRED`, `import` gives a stand-in. Each name of a stand-in is a class, which other code can import,
annotate with and derive from. When other code calls it, reads one of its values or iterates over it, the real package
is imported. So a package that is used after all is only imported later. A package that is not installed cannot be
imported, as usual.

Environment: FTGEN_IMPORT_ALL=1 turns this off.
"""

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from runtime.engines.nemo import compatibility

OFF = "FTGEN_IMPORT_ALL"
# Package: who imports it, and what for. Names of these packages must not be compared: a stand-in is equal only to itself.
DEFERRED = {
    "accelerate": "transformers: models on several devices, which Megatron does here",
    "datasets": "NeMo: downloads of data sets, where runtime/data writes the files; with aiohttp",
    "leptonai": "nemo_run: a cloud's client; with fastapi, httpx, trio",
    "modelopt": "NeMo: quantization, pruning and distillation; with transformers' trainer",
    "nemo.collections.llm.modelopt": "NeMo: the same",
    "pandas": "NeMo: a tokenizer of tables",
    "paramiko": "nemo_run: tunnels to other machines; with cryptography",
    "pytorch_lightning": "NeMo: a reranker; a second copy of `lightning`",
    "scipy": "torchmetrics, transformers: metrics of audio, the loss of object detection",
    "sklearn": "transformers: a metric of assisted decoding",
    "torch.utils.tensorboard": "Megatron-Core: a logger; with tensorboard",
    "wandb": "Megatron-Core: a logger",
}
# Functions of NeMo's modelopt that every training calls, and that do nothing here: no checkpoint of ftgen has a state
# of modelopt, and no model is distilled.
NOTHING_TO_DO = {
    "nemo.collections.llm.modelopt.set_modelopt_spec_if_exists_in_ckpt",
    "nemo.collections.llm.modelopt.model_utils.restore_modelopt_state",
    "nemo.collections.llm.modelopt.model_utils.save_modelopt_state",
    "nemo.collections.llm.modelopt.distill.utils.get_tensor_shapes_adjust_fn_for_distillation",
}
# Megatron-Core's memory for inference. In 0.15, its import compiles a CUDA extension and initializes CUDA, in every
# process, to set has_unified_memory. 0.14 has no such module, and in 0.16 its import does neither.
MANAGED_MEMORY = "megatron.core.inference.unified_memory"


def defer() -> None:
    """Defer the packages in `DEFERRED` from now on. A package that is already imported stays as it is."""
    compatibility.before_imports()
    if os.environ.get(OFF, "0") in {"", "0"} and not any(isinstance(finder, Deferring) for finder in sys.meta_path):
        sys.meta_path.insert(0, Deferring(DEFERRED))
        if "has_unified_memory" in compatibility.source(MANAGED_MEMORY):
            compatibility.stand_in(MANAGED_MEMORY, has_unified_memory=False, create_unified_mempool=None)


class Deferring(MetaPathFinder, Loader):
    """Import hook: gives stand-ins for modules of packages that are installed and not used yet."""

    def __init__(self, packages: Iterable[str]) -> None:
        self.waiting = {package for package in packages if package not in sys.modules}
        self.written: list[tuple[str, str, Any]] = []  # assignments to names of stand-ins: module, name, value
        self.lock = threading.Lock()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The real module's spec, with this object as the loader."""
        package = next((package for package in self.waiting if _is_in(package, name)), None)
        if package is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        real = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if real is None:
            return None
        spec = ModuleSpec(name, self, origin=real.origin, loader_state=package)
        spec.submodule_search_locations = real.submodule_search_locations
        spec.has_location = real.has_location
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Create the stand-in."""
        return StandIn(spec.name, self, str(spec.loader_state))

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: executing the real module is what takes time."""

    def real(self, package: str, module: str, key: str) -> Any:
        """The real object behind `key` ("a" or "a.b") of the module. The real package replaces the stand-in."""
        with self.lock:
            if was_waiting := package in self.waiting:
                self.waiting.remove(package)
                for name in [name for name in sys.modules if _is_in(package, name)]:
                    del sys.modules[name]
        if was_waiting:
            self._write(package)
        found: Any = importlib.import_module(module)
        for part in key.split("."):
            found = _attribute(found, part)
        return found

    def _write(self, package: str) -> None:
        for module, key, value in self.written:
            if _is_in(package, module):
                owner, _, name = key.rpartition(".")
                setattr(self.real(package, module, owner), name, value)


def _attribute(owner: Any, key: str) -> Any:
    """Like getattr. Also finds a sub-module that was imported as a stand-in, but not yet for real."""
    if isinstance(owner, ModuleType) and not hasattr(owner, key):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(f"{owner.__name__}.{key}")
    return getattr(owner, key)


def _is_in(package: str, name: str) -> bool:
    return name == package or name.startswith(f"{package}.")


class StandIn(ModuleType):
    """Stands in for a module. It has every name."""

    def __init__(self, name: str, finder: Deferring, package: str) -> None:
        super().__init__(name)
        self.__dict__["_deferred"] = (finder, package)

    def __getattr__(self, key: str) -> Any:
        finder, package = self.__dict__["_deferred"]
        if package in finder.waiting:
            if f"{self.__name__}.{key}" in NOTHING_TO_DO:
                return _nothing
            if not _is_special(key):
                return _name(finder, package, self.__name__, key)
            if key not in {"__version__", "__all__"}:  # inspect and warnings read other special names of every module
                raise AttributeError(f"module {self.__name__!r} has no attribute {key!r}")
        return finder.real(package, self.__name__, key)


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Do nothing, as the real function does here."""


def _is_special(key: str) -> bool:
    return key.startswith("__") and key.endswith("__")


def _name(finder: Deferring, package: str, module: str, key: str) -> type:
    return Name(key.rpartition(".")[2], (), {"__module__": module, "_stands_for": (finder, package, module, key)})


class Name(type):
    """Metaclass of the classes that stand in for names of a deferred package, and of classes derived from them."""

    def _real(cls) -> Any:
        if "_stands_for" not in cls.__dict__:
            base = next(base for base in cls.__mro__ if "_stands_for" in base.__dict__)
            raise RuntimeError(
                f"{cls.__module__}.{cls.__name__} cannot be used: it is derived from {base.__module__}.{base.__name__}, "
                f"which ftgen does not import for a fine-tune. export {OFF}=1 imports it"
            )
        finder, package, module, key = cls.__dict__["_stands_for"]
        return finder.real(package, module, key)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Call the real object. RuntimeError: this class is derived from a stand-in."""
        return cls._real()(*args, **kwargs)

    def __getattr__(cls, key: str) -> Any:
        if "_stands_for" not in cls.__dict__ or _is_special(key):
            raise AttributeError(f"type object {cls.__name__!r} has no attribute {key!r}")
        finder, package, module, own = cls.__dict__["_stands_for"]
        if package in finder.waiting:
            return _name(finder, package, module, f"{own}.{key}")
        return finder.real(package, module, f"{own}.{key}")

    def __setattr__(cls, key: str, value: Any) -> None:
        if "_stands_for" not in cls.__dict__ or _is_special(key):
            super().__setattr__(key, value)
            return
        finder, package, module, own = cls.__dict__["_stands_for"]
        if package in finder.waiting:
            finder.written.append((module, f"{own}.{key}", value))
        else:
            setattr(finder.real(package, module, own), key, value)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls._real()) if "_stands_for" in cls.__dict__ else super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls._real()) if "_stands_for" in cls.__dict__ else super().__subclasscheck__(subclass)

    def __iter__(cls) -> Iterator[Any]:
        return iter(cls._real())

    def __getitem__(cls, key: Any) -> Any:
        return cls._real()[key]
