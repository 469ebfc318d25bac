"""Make NeMo and Megatron-Core run on a machine without a GPU. This is for tests, not for measurements.

In: a process that has not used NeMo yet. Out: `stand_in()` changes torch.cuda for this process; `plain()` gives settings.

`stand_in()` replaces the functions of torch.cuda that NeMo and Megatron-Core always call by functions that do
nothing, and puts tensors for "cuda" on the CPU. `plain()` switches off the fused kernels and selects Megatron's own
layers instead of Transformer Engine's. Both kinds of layers have the same names in a checkpoint, so GPUs can train a
checkpoint that was converted on a CPU.
"""

import contextlib
import functools
import logging
import os
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
)
# Names of the norms in Megatron's own layers. Transformer Engine fuses them into the next linear layer.
NORMS = {
    "model.layers.*.input_layernorm.weight": "decoder.layers.*.input_layernorm.weight",
    "model.layers.*.post_attention_layernorm.weight": "decoder.layers.*.pre_mlp_layernorm.weight",
}


def plain() -> dict[str, Any]:
    """Settings of a model's config that need no GPU."""
    from nemo.collections.llm.gpt.model.base import local_layer_spec

    return dict.fromkeys(FUSIONS, False) | {"transformer_layer_spec": local_layer_spec}


def stand_in() -> None:
    """Replace functions of torch.cuda for the rest of this process. A second call does nothing."""
    if torch.cuda.is_available() or torch.cuda.Stream is _Idle:
        return
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron requires it, also without a GPU
    for name, value in _stand_ins().items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    torch.Tensor.cuda = _same
    torch.nn.Module.cuda = _same
    import megatron.core.tensor_parallel.random as megatron_random
    from nemo.collections.llm.peft import lora
    from nemo.collections.llm.peft import utils as lora_layers
    from nemo.lightning import megatron_init
    from nemo.lightning.io import pl as nemo_checkpoints
    from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter

    megatron_random._set_cuda_rng_state = torch.cuda.set_rng_state
    megatron_random._get_cuda_rng_state = torch.cuda.get_rng_state
    if not getattr(lora, "HAVE_TE", True):  # NeMo 2.1 does not ask
        lora.te = types.SimpleNamespace(Linear=None)  # LoRA tests whether a layer is a te.Linear
        lora_layers.HAVE_TE = False  # NeMo 2.7 sets it to True here though Transformer Engine is not installed
    megatron_init._set_random_seed = _with_a_device(megatron_init._set_random_seed)
    nemo_checkpoints._fix_tensors_device = _same  # it moves loaded tensors between GPUs
    # Rank 0 alone gathers Megatron's timers from all ranks. Gloo takes that for the next collective of the other ranks.
    ProgressPrinter.log_megatron_timers = _nothing
    # CPU and GPU share one random generator here. Megatron would warn each time that the CPU's state changes.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    _OnTheCpu().__enter__()  # never exited


@contextlib.contextmanager
def plain_import() -> Iterator[None]:
    """In this block, NeMo's importers of Hugging Face checkpoints build a model with `plain()` and find its norms."""
    from nemo.collections.llm.gpt.model import llama, mistral, qwen2
    from nemo.lightning import io

    with contextlib.ExitStack() as stack:
        for config in (llama.LlamaConfig, llama.Llama31Config, mistral.MistralConfig7B, qwen2.Qwen2Config):
            stack.enter_context(_replaced(config, "__init__", _with_defaults(config.__init__, plain())))
        stack.enter_context(_replaced(io, "apply_transforms", _with_norms(io.apply_transforms)))
        yield


class _Idle:
    """Stands in for a CUDA stream or event: every method does nothing."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return _nothing


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
        "manual_seed": _nothing,
        "set_device": _nothing,
        "set_rng_state": lambda state, *_args, **_kwargs: torch.set_rng_state(state),
        "stream": lambda _stream: contextlib.nullcontext(),
        "synchronize": _nothing,
        "_lazy_call": _nothing,
        "_lazy_init": _nothing,
    }


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def _same(self: Any, *_args: Any, **_kwargs: Any) -> Any:
    return self


def _is_cuda(value: Any) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _with_defaults(init: Callable[..., None], defaults: dict[str, Any]) -> Callable[..., None]:
    @functools.wraps(init)
    def with_defaults(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **(defaults | kwargs))

    return with_defaults


def _with_a_device(set_random_seed: Callable[[int], None]) -> Callable[[int], None]:
    """NeMo seeds the generator of the weights only if there is a GPU."""

    def with_a_device(seed: int) -> None:
        with _replaced(torch.cuda, "device_count", lambda: 1):
            set_random_seed(seed)

    return with_a_device


def _with_norms(apply_transforms: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(apply_transforms)
    def with_norms(source: Any, target: Any, mapping: dict[str, str], *args: Any, **kwargs: Any) -> Any:
        for module in target.modules():
            if isinstance(module, torch.nn.RMSNorm):
                module.to(source.dtype)  # PyTorch's norm does not know the type of the other weights
        return apply_transforms(source, target, mapping | NORMS, *args, **kwargs)

    return with_norms
