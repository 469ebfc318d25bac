"""Find out whether the installed packages have what an optimization uses.

In: names, such as "megatron.core.optimizer:OptimizerConfig.lr". Out: the first one that is not there, as a phrase.

A name is module:object.attribute. An attribute may also be the field of a dataclass or, written object(name), the
parameter of a function or a class. Versions are not looked at: images have versions between two releases.
"""

import inspect
from importlib import import_module
from typing import Any


def missing(*names: str) -> str:
    """What is missing of these names, such as "megatron.core.optimizer has no Muon"; "" if nothing is missing."""
    return next((phrase for name in names if (phrase := _missing(name))), "")


def _missing(name: str) -> str:
    module, _, path = name.partition(":")
    path, _, parameter = path.rstrip(")").partition("(")
    try:
        found: Any = import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported ({error})"
    for attribute in path.split("."):
        if not has(found, attribute):
            return f"{module} has no {path}"
        found = getattr(found, attribute, None)
    if parameter and parameter not in inspect.signature(found).parameters:
        return f"{module}.{path} has no parameter {parameter}"
    return ""


def has(owner: Any, attribute: str) -> bool:
    """Whether an object has the attribute, or a dataclass the field."""
    fields = [key for kind in getattr(owner, "__mro__", ()) for key in vars(kind).get("__annotations__", ())]
    return getattr(owner, attribute, None) is not None or attribute in fields
