"""Start all gathers of weights when the optimizer's step ends, and sum the LM head's gradient first.

In: a recipe, which stays as it is. Out: Megatron-Core, changed for this process.

With a distributed optimizer, every GPU updates a part of the weights and gathers the others before it uses them.

1. Megatron-Core starts the first gather when the next forward pass waits for it, and each further one when a layer begins.
Here all start when the optimizer's step ends, in the order of their use. They run while the host logs and reads data.

2. With weights in FP8, Megatron-Core sums the gradients of all BF16 weights (embedding, norms, LM head) with those of the
first layer, when the backward pass has ended and nothing can hide it, and gathers them before the first layer. Here the LM
head has a group of its own: its gradient is the first to be ready, and its weights are the last to be used.
"""

from typing import Any

from runtime.engines.nemo.optimizations import needs


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.step_with_ready_grads",
        "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_param_sync",
        "megatron.core.distributed.distributed_data_parallel:partition_buckets(buffers)",
    )


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Change both in this process."""
    from megatron.core.distributed import distributed_data_parallel
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    DistributedOptimizer.step_with_ready_grads = then_gather(DistributedOptimizer.step_with_ready_grads)
    distributed_data_parallel.partition_buckets = with_a_group_for_the_head(distributed_data_parallel.partition_buckets)


def then_gather(step: Any) -> Any:
    """An optimizer's step that starts all gathers when it ends. The forward pass waits for each, and starts none."""

    def step_and_gather(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = step(self, *args, **kwargs)
        if self.ddp_config.overlap_param_gather:
            for chunk in self.model_chunks:
                for group in reversed(chunk.bucket_groups):  # they are in the order of the backward pass
                    group.next_param_gather_bucket_group = None
                    if not group.param_gather_dispatched:
                        group.start_param_sync()
        return done

    return step_and_gather


def with_a_group_for_the_head(partition: Any) -> Any:
    """Megatron-Core's groups of buckets, in the order of the backward pass, where the first BF16 bucket has a group."""

    def partition_and_split(buffers: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        groups: list[Any] = partition(buffers, *args, **kwargs)
        if len(groups) < 2 or len(groups[-1].buckets) < 3:  # an FP8 bucket, one of the LM head, one of the embedding
            return groups
        last = groups[-1]
        fp8, head, *others = last.buckets
        size = getattr(last, "intra_distributed_optimizer_instance_size", 0)
        if not size or len(head.params_list) > 1:  # no distributed optimizer, or a head that is tied to the embedding
            return groups
        like = (last.ddp_config, last.intra_distributed_optimizer_instance_group, size)
        return [type(last)([head], *like), *groups[:-1], type(last)([fp8, *others], *like)]

    return partition_and_split
