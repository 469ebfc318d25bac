"""Let Adam read the BF16 gradients, instead of a copy of them in float32.

In: a recipe, which stays as it is. Out: Megatron-Core, changed for this process.

The distributed optimizer copies its shard of the gradients from BF16 to float32, computes their norm, scales them if the
norm is larger than `clip_grad`, and updates the weights. Transformer Engine's kernels compute in float32 whatever they read.
Here they read BF16. Only gradients that are scaled become float32, in the kernel that scales them. All values are the same
bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runtime.engines import clipping
from runtime.engines.nemo.optimizations import needs

READS_OTHERS = "use_precision_aware_optimizer_no_fp8_or_ds_fp8"  # whether gradients are in `decoupled_grad`


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._copy_model_grads_to_main_grads",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.get_main_grads_for_grad_norm",
        "megatron.core.optimizer.optimizer:clip_grad_by_total_norm_fp32",
        "megatron.core.optimizer.optimizer_config:OptimizerConfig.__post_init__",
        "transformer_engine.pytorch.optimizers:FusedAdam(use_decoupled_grad)",
    )


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Change the distributed optimizer in this process."""
    from megatron.core.optimizer import optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    DistributedOptimizer._copy_model_grads_to_main_grads = give_views
    DistributedOptimizer.get_main_grads_for_grad_norm = _of_views(DistributedOptimizer.get_main_grads_for_grad_norm)
    DistributedOptimizer.step_with_ready_grads = _then_let_go(DistributedOptimizer.step_with_ready_grads)
    optimizer.clip_grad_by_total_norm_fp32 = clip


def give_views(self: Any) -> None:
    """Give each float32 shard of the weights its shard of the gradients, as it is."""
    if self.is_stub_optimizer:
        return
    self.optimizer.use_decoupled_grad = True
    groups = [*zip(self.model_float16_groups, self.shard_fp32_from_float16_groups, strict=True)]
    groups += zip(self.model_fp32_groups, self.shard_fp32_groups, strict=True)
    for weights, shards in groups:
        for weight, shard in zip(weights, shards, strict=True):
            place = self._get_model_param_range_map(weight)["param"]
            shard.decoupled_grad = weight.main_grad.view(-1)[place.start : place.end]


def _of_views(get_gradients: Any) -> Any:
    def get_views(self: Any) -> Any:
        with _reading_others(self.config):
            return get_gradients(self)

    return get_views


def _then_let_go(step: Any) -> Any:
    """After the step, no shard keeps a gradient: those in float32 need memory."""

    def step_and_let_go(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = step(self, *args, **kwargs)
        for shard in self.get_parameters():
            shard.decoupled_grad = None
        return done

    return step_and_let_go


def clip(shards: list[Any], max_norm: float, total_norm: Any, use_decoupled_grad: bool = False) -> None:
    """Megatron-Core's clip_grad_by_total_norm_fp32 that leaves the BF16 gradients alone, and scales into float32.

    A norm that is still on the GPU (see async_step.py) gives a factor that is there too: 1 where nothing is to be scaled.
    """
    del use_decoupled_grad
    import torch

    with_gradients = [shard for shard in shards if getattr(shard, "decoupled_grad", None) is not None]
    if hasattr(total_norm, "exact"):
        factor = clipping.factor(total_norm.exact, max_norm).view(1)
    else:
        coefficient = max_norm / (total_norm + clipping.EPSILON)
        if coefficient >= 1.0 or not with_gradients:
            return
        factor = torch.tensor([coefficient], dtype=torch.float32, device=with_gradients[0].decoupled_grad.device)
    for shard in with_gradients:
        gradient = shard.decoupled_grad
        shard.decoupled_grad = torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=torch.float32))


@contextmanager
def _reading_others(config: Any) -> Iterator[None]:
    before = getattr(config, READS_OTHERS)
    setattr(config, READS_OTHERS, True)
    try:
        yield
    finally:
        setattr(config, READS_OTHERS, before)
