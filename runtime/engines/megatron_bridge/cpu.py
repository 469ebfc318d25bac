"""Make Megatron-Bridge run on a machine without a GPU. This is for tests, not for measurements.

In: a process that has imported Megatron-Bridge and not used it. Out: `stand_in()` changes it for this process; `plain()`
changes a model's config.

`plain()` switches off the fused kernels and selects Megatron's own layers instead of Transformer Engine's. Both kinds of
layers have the same names in a checkpoint, so GPUs can train a checkpoint that was converted on a CPU.
"""

import functools
import queue
from types import SimpleNamespace
from typing import Any

from runtime.engines import no_gpu, packed_attention


def plain(config: Any) -> Any:
    """The config of a model, with settings that need no GPU."""
    from megatron.bridge.models.gpt_provider import local_layer_spec

    for name in no_gpu.FUSIONS:
        setattr(config, name, False)
    config.transformer_layer_spec = local_layer_spec
    config.transformer_impl = "local"
    return config


def stand_in() -> None:
    """Replace functions of torch.cuda and Megatron-Bridge for the rest of this process. A second call does nothing."""
    if no_gpu.is_done():
        return
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
    from megatron.bridge.peft import module_matcher
    from megatron.bridge.peft import utils as adapters
    from megatron.bridge.training import initialize, setup
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # It takes Transformer Engine for installed, because Megatron-Core has the names of its layers, which are None.
    adapters.HAVE_TE = module_matcher.HAVE_TE = False
    for name in ("HAVE_TE_COL_LINEAR", "HAVE_TE_LN_COL_LINEAR", "HAVE_TE_ROW_LINEAR"):
        setattr(module_matcher, name, False)
    for kind in _all_subclasses(MegatronModelBridge):
        if "provider_bridge" in vars(kind):
            kind.provider_bridge = _plain_provider(kind.provider_bridge)
    setup.set_jit_fusion_options = no_gpu.nothing  # it runs the fused kernels once
    setup.initialize_megatron = functools.partial(setup.initialize_megatron, allow_no_cuda=True)
    initialize._set_random_seed = _with_a_device(initialize._set_random_seed)
    # Megatron-Core's own queue of results needs a second process, which would import everything again.
    results: Any = queue.Queue()
    results._manager = SimpleNamespace(shutdown=no_gpu.nothing)  # Megatron-Bridge ends it
    filesystem_async._results_queue = results
    packed_attention.install()
    no_gpu.stand_in()


def _all_subclasses(kind: type) -> set[Any]:
    own: set[Any] = set(kind.__subclasses__())
    return own.union(*(_all_subclasses(each) for each in own))


def _plain_provider(stock: Any) -> Any:
    @functools.wraps(stock)
    def provider_bridge(self: Any, hf_pretrained: Any) -> Any:
        return plain(stock(self, hf_pretrained))

    return provider_bridge


def _with_a_device(seed: Any) -> Any:
    """Megatron-Bridge seeds the generator of the weights only if it counts a GPU."""

    def seeded(*args: Any, **kwargs: Any) -> Any:
        import torch

        with no_gpu.replaced(torch.cuda, "device_count", lambda: 1):
            return seed(*args, **kwargs)

    return seeded
