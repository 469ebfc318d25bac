"""Stand in for torch.cuda on a machine without a GPU. This is for tests, not for measurements.

In: a process that has not used Megatron-Core yet. Out: torch.cuda is changed for this process.

The functions of torch.cuda that Megatron-Core always calls do nothing here, and tensors for "cuda" are on the CPU. Each
engine's cpu.py adds what its framework needs.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Settings of a model's config that need fused kernels.
FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
)


def is_done() -> bool:
    """Whether there is nothing to stand in for: there is a GPU, or `stand_in` was called before."""
    return torch.cuda.is_available() or torch.cuda.Stream is _Idle


def stand_in() -> None:
    """Replace functions of torch.cuda for the rest of this process. Call it once."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron requires it, also without a GPU
    for name, value in _stand_ins().items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    torch.Tensor.cuda = same
    torch.nn.Module.cuda = same
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._set_cuda_rng_state = torch.cuda.set_rng_state
    megatron_random._get_cuda_rng_state = torch.cuda.get_rng_state
    # CPU and GPU share one random generator here. Megatron would warn each time that the CPU's state changes.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    _OnTheCpu().__enter__()  # never exited


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """In this block, the attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def with_a_device(set_random_seed: Callable[[int], None]) -> Callable[[int], None]:
    """A function that seeds the generator of the weights only if there is a GPU, as if there were one."""

    def with_a_device(seed: int) -> None:
        with replaced(torch.cuda, "device_count", lambda: 1):
            set_random_seed(seed)

    return with_a_device


class _Idle:
    """Stands in for a CUDA stream or event: every method does nothing."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return nothing


class _OnTheCpu(TorchFunctionMode):  # type: ignore[misc]
    """Creates tensors for "cuda" on the CPU, and leaves tensors on the CPU that are moved to "cuda"."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if isinstance(kwargs.get("pin_memory"), bool):
            kwargs["pin_memory"] = False
        if getattr(func, "__name__", "") == "to":
            args = tuple("cpu" if _is_cuda(value) else value for value in args)
        return func(*args, **kwargs)


def _stand_ins() -> dict[str, Any]:
    names = ("ByteTensor", "IntTensor", "LongTensor", "HalfTensor", "BFloat16Tensor", "FloatTensor", "DoubleTensor")
    return {
        **{name: getattr(torch, name) for name in names},
        "Event": _Idle,
        "Stream": _Idle,
        "current_device": lambda: torch.device("cpu"),
        "current_stream": _Idle,
        "get_rng_state": lambda *_args, **_kwargs: torch.get_rng_state(),
        "manual_seed": nothing,
        "set_device": nothing,
        "set_rng_state": lambda state, *_args, **_kwargs: torch.set_rng_state(state),
        "stream": lambda _stream: contextlib.nullcontext(),
        "synchronize": nothing,
        "_lazy_call": nothing,
        "_lazy_init": nothing,
    }


def nothing(*_args: Any, **_kwargs: Any) -> None:
    """Do nothing."""


def decorates_nothing(function: Any) -> Any:
    """The function itself, as a decorator."""
    return function


def same(self: Any, *_args: Any, **_kwargs: Any) -> Any:
    """The object itself."""
    return self


def _is_cuda(value: Any) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")
