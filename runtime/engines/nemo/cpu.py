"""Make NeMo and Megatron-Core run on a machine without a GPU. This is for tests, not for measurements.

In: a process that has not used NeMo yet. Out: `stand_in()` changes torch.cuda for this process; `plain()` gives settings.

`stand_in()` replaces the functions of torch.cuda that NeMo and Megatron-Core always call by functions that do
nothing, and puts tensors for "cuda" on the CPU. `plain()` switches off the fused kernels and selects Megatron's own
layers instead of Transformer Engine's. Both kinds of layers have the same names in a checkpoint, so GPUs can train a
checkpoint that was converted on a CPU.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from runtime.engines import no_gpu, packed_attention

# Names of the norms in Megatron's own layers. Transformer Engine fuses them into the next linear layer.
NORMS = {
    "model.layers.*.input_layernorm.weight": "decoder.layers.*.input_layernorm.weight",
    "model.layers.*.post_attention_layernorm.weight": "decoder.layers.*.pre_mlp_layernorm.weight",
}


def plain() -> dict[str, Any]:
    """Settings of a model's config that need no GPU."""
    from nemo.collections.llm.gpt.model.base import local_layer_spec

    return dict.fromkeys(no_gpu.FUSIONS, False) | {"transformer_layer_spec": local_layer_spec}


def stand_in() -> None:
    """Replace functions of torch.cuda and NeMo for the rest of this process. A second call does nothing."""
    if no_gpu.is_done():
        return
    from nemo.collections.llm.peft import lora
    from nemo.collections.llm.peft import utils as lora_layers
    from nemo.lightning import megatron_init
    from nemo.lightning.io import pl as nemo_checkpoints
    from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter

    if not getattr(lora, "HAVE_TE", True):  # NeMo 2.1 does not ask
        lora.te = types.SimpleNamespace(Linear=None)  # LoRA tests whether a layer is a te.Linear
        lora_layers.HAVE_TE = False  # NeMo 2.7 sets it to True here though Transformer Engine is not installed
    megatron_init._set_random_seed = no_gpu.with_a_device(megatron_init._set_random_seed)
    nemo_checkpoints._fix_tensors_device = no_gpu.same  # it moves loaded tensors between GPUs
    # Rank 0 alone gathers Megatron's timers from all ranks. Gloo takes that for the next collective of the other ranks.
    ProgressPrinter.log_megatron_timers = no_gpu.nothing
    packed_attention.install()
    no_gpu.stand_in()


@contextlib.contextmanager
def plain_import() -> Iterator[None]:
    """In this block, NeMo's importers of Hugging Face checkpoints build a model with `plain()` and find its norms."""
    from nemo.collections.llm.gpt.model import llama, mistral, qwen2
    from nemo.lightning import io

    with contextlib.ExitStack() as stack:
        for config in (llama.LlamaConfig, llama.Llama31Config, mistral.MistralConfig7B, qwen2.Qwen2Config):
            stack.enter_context(no_gpu.replaced(config, "__init__", _with_defaults(config.__init__, plain())))
        stack.enter_context(no_gpu.replaced(io, "apply_transforms", _with_norms(io.apply_transforms)))
        yield


def _with_defaults(init: Callable[..., None], defaults: dict[str, Any]) -> Callable[..., None]:
    @functools.wraps(init)
    def with_defaults(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **(defaults | kwargs))

    return with_defaults


def _with_norms(apply_transforms: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(apply_transforms)
    def with_norms(source: Any, target: Any, mapping: dict[str, str], *args: Any, **kwargs: Any) -> Any:
        for module in target.modules():
            if isinstance(module, torch.nn.RMSNorm):
                module.to(source.dtype)  # PyTorch's norm does not know the type of the other weights
        return apply_transforms(source, target, mapping | NORMS, *args, **kwargs)

    return with_norms
