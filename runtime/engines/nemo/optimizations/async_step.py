"""Let the host run ahead of the GPU: at the end of a step, nothing waits for it.

In: a recipe. Out: the recipe with another printer of step lines, and NeMo, Megatron-Core and Lightning changed for this
process.

At the end of a step, the stock recipe reads values from the GPU again and again. Each time the host waits until the GPU
has done all its work. Then the GPU waits until the host has launched the optimizer and the first layer of the next step.
Here

1. the loss is averaged without asking which micro-batches have a loss,
2. the norm of the gradients stays on the GPU, and they are scaled by a factor that is computed there,
3. what Lightning logs stays where it is: numbers on the CPU, tensors on the GPU,
4. Transformer Engine's cross entropy does not compare its gradient with the number 1, which it copies to the GPU first, and
   waits, once per micro-batch. The gradient has a value for each token, so they are never equal,
5. the line of a step is printed when the next step has been launched, the last one at the end. The host is ahead by one
   step at most. The time of a step is that from the end of the one before to its own, on the GPU.
"""

import contextlib
import functools
import time
from types import SimpleNamespace
from typing import Any, NamedTuple

import nemo_run as run
import torch
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.connectors.logger_connector import result
from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter

from runtime.engines import clipping
from runtime.engines.nemo import step_ends
from runtime.engines.nemo.optimizations import needs
from runtime.node import telemetry

TIME = "train_step_timing in s"  # as NeMo's TimingCallback calls it


def missing(_recipe: Any, plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    capturable = ("megatron.core.extensions.transformer_engine:te_parallel_cross_entropy(is_cg_capturable)",)
    return needs.missing(
        *(capturable if plan["optimizations"]["fused_cross_entropy"] else ()),
        "megatron.core.optimizer.optimizer:get_grad_norm_fp32",
        "megatron.core.optimizer.optimizer:clip_grad_by_total_norm_fp32(use_decoupled_grad)",
        "megatron.core.optimizer.clip_grads:multi_tensor_applier",
        "megatron.core.optimizer.clip_grads:l2_norm_impl",
        "nemo.lightning.megatron_parallel:MaskedTokenLossReduction.reduce",
        "lightning.pytorch.trainer.connectors.logger_connector.result:convert_tensors_to_scalars",
        "lightning.pytorch.trainer.connectors.logger_connector.result:_ResultMetric.to",
    )


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Change the packages, and print the step lines late."""
    install()
    recipe.trainer.callbacks = [*(recipe.trainer.callbacks or []), run.Config(LatePrinter)]


def install() -> None:
    """Change what waits for the GPU, in this process. Call it once."""
    from megatron.core.models.common.language_module import language_module
    from megatron.core.optimizer import optimizer
    from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

    language_module.te_parallel_cross_entropy = _without_comparing(language_module.te_parallel_cross_entropy)
    MaskedTokenLossReduction.reduce = _without_asking(MaskedTokenLossReduction.reduce)
    optimizer.get_grad_norm_fp32 = _on_the_gpu(optimizer.get_grad_norm_fp32)
    optimizer.clip_grad_by_total_norm_fp32 = _scaled_on_the_gpu(optimizer.clip_grad_by_total_norm_fp32)
    LightningModule.log = _with_numbers_on_the_cpu(LightningModule.log)
    result.convert_tensors_to_scalars = _as_it_is  # it is called for all metrics whenever any is looked at
    result._ResultMetric.to = _unless_there(result._ResultMetric.to)
    tells: Any = step_ends.TellSteps
    tells.on_train_batch_end = Callback.on_train_batch_end  # LatePrinter tells when a step has ended


def _without_comparing(cross_entropy: Any) -> Any:
    """Transformer Engine's loss as inside of a CUDA graph, where it must not wait: with the same kernels."""

    def without_comparing(logits: Any, labels: Any, tp_group: Any, _is_cg_capturable: bool = False) -> Any:
        return cross_entropy(logits, labels, tp_group, True)

    return cross_entropy and without_comparing  # None without Transformer Engine


def _without_asking(reduce: Any) -> Any:
    """Stock asks the GPU for each micro-batch whether it has tokens with a loss. Those without count as zero here."""

    @functools.wraps(reduce)
    def reduce_without_asking(self: Any, losses_reduced_per_micro_batch: Any) -> Any:
        from megatron.core import parallel_state

        losses = [each.get("loss_sum_and_ub_size") for each in losses_reduced_per_micro_batch or ()]
        if not losses or any(loss is None for loss in losses):
            return reduce(self, losses_reduced_per_micro_batch)
        each = torch.vstack(losses)  # sum of the losses, number of tokens
        both = each.masked_fill(each[:, 1:] <= 0, 0).sum(dim=0)
        torch.distributed.all_reduce(both, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return both[0] / both[1]

    return reduce_without_asking


def _on_the_gpu(norm_of: Any) -> Any:
    """The norm as a tensor. Its attribute `exact` is in float64, in which stock computes with it on the CPU."""
    from megatron.core.optimizer import clip_grads

    @functools.wraps(norm_of)
    def norm_on_the_gpu(grads_for_norm: Any, norm_type: float = 2, grad_stats_parallel_group: Any = None) -> Any:
        grads = [grads_for_norm] if isinstance(grads_for_norm, torch.Tensor) else grads_for_norm
        if norm_type != 2 or not grads:
            return norm_of(grads_for_norm, norm_type, grad_stats_parallel_group)
        overflow = torch.zeros(1, dtype=torch.int, device="cuda")
        norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [grads], False)
        square = norm**2.0
        torch.distributed.all_reduce(square, op=torch.distributed.ReduceOp.SUM, group=grad_stats_parallel_group)
        exact = square.double().sqrt().squeeze()
        total = exact.float()  # what NeMo logs
        total.exact = exact
        return total

    return norm_on_the_gpu


def _scaled_on_the_gpu(clip: Any) -> Any:
    """Stock scales the gradients if the factor is below 1. Here the factor is 1 otherwise, also if the norm is NaN."""

    @functools.wraps(clip)
    def scale(parameters: Any, max_norm: float, total_norm: Any, use_decoupled_grad: bool = False) -> None:
        exact = getattr(total_norm, "exact", None)
        if exact is None or use_decoupled_grad:
            clip(parameters, max_norm, float(total_norm if exact is None else exact), use_decoupled_grad)
            return
        if grads := [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]:
            torch._foreach_mul_(grads, clipping.factor(exact, max_norm))

    return scale


def _with_numbers_on_the_cpu(log: Any) -> Any:
    """Lightning would copy a number to the GPU, and wait."""

    @functools.wraps(log)
    def log_on_the_cpu(self: Any, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        log(self, name, torch.tensor(float(value)) if isinstance(value, int | float) else value, *args, **kwargs)

    return log_on_the_cpu


def _unless_there(to: Any) -> Any:
    """Lightning takes 0.4 ms to copy a metric, with all that it knows about it, each time that a value is logged."""

    @functools.wraps(to)
    def to_elsewhere(self: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_tensor and self.value.device == torch.device(device):
            return self
        return to(self, device, *args, **kwargs)

    return to_elsewhere


def _as_it_is(value: Any) -> Any:
    return value


class Moment:
    """When the GPU comes to what the host launches next; without a GPU, now."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()
        self.now = time.time()

    def wait(self) -> bool:
        """Wait for it. Whether it was still to come, so that it is now."""
        is_to_come = torch.cuda.is_available() and not self.event.query()
        self.event.synchronize()
        self.now = time.time() if is_to_come else self.now
        return is_to_come

    def since(self, other: "Moment") -> float:
        """Seconds from another moment to this one, which has come."""
        return other.event.elapsed_time(self.event) / 1e3 if torch.cuda.is_available() else self.now - other.now


class Launched(NamedTuple):
    """A step that the host has launched, and that the GPU may still be at."""

    number: int  # of the run, counted from 0
    then: Any  # what NeMo's printer asks a trainer, as it was then
    metrics: dict[str, Any]  # on their way to the CPU
    began: Moment
    ended: Moment  # the metrics are there then


class LatePrinter(ProgressPrinter):  # type: ignore[misc]
    """Prints NeMo's line of a step when the next step was launched, and before anything that is not a step."""

    def __init__(self) -> None:
        super().__init__()
        self.running: Launched | None = None
        self.began: Moment
        self.known: Moment  # the last one whose time on the clock is known

    def on_train_batch_start(self, *_args: Any) -> None:
        """Note when a step begins, if it does not follow on another one."""
        if not self.running:
            self.began = self.known = Moment()
            self.began.wait()

    def on_train_batch_end(self, trainer: Any, module: Any, *_args: Any, **_kwargs: Any) -> None:
        """A step is launched. Wait for the end of the one before it."""
        strategy = trainer.strategy
        values = {
            name: value.detach().to("cpu", non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in super().get_metrics(trainer, module).items()
        }
        ended = Moment()
        step = SimpleNamespace(current_epoch_step=strategy.current_epoch_step, timers=getattr(strategy, "timers", None))
        then = SimpleNamespace(current_epoch=trainer.current_epoch, strategy=step)
        self.finish()
        self.running = Launched(trainer.global_step - 1, then, values, self.began, ended)
        self.began = ended  # of the next step, if it follows on this one
        if trainer.global_step == trainer.max_steps:
            self.finish()

    def get_metrics(self, _trainer: Any, metrics: Any) -> Any:
        """What NeMo's printer prints: what `finish` gives it."""
        return metrics

    def finish(self) -> None:
        """Wait for the end of the step that is running, if any, and print its line. A save calls it first (save.py)."""
        if not self.running:
            return
        step, self.running = self.running, None
        if step.ended.wait():
            self.known = step.ended
        telemetry.after_step(step.number, self.known.now + step.ended.since(self.known))
        metrics = convert_tensors_to_scalars(step.metrics)
        if TIME in metrics:
            metrics[TIME] = step.ended.since(step.began)
        super().on_train_batch_end(step.then, metrics)

    def on_validation_start(self, *_args: Any) -> None:
        """Before a validation."""
        self.finish()

    def on_train_end(self, *_args: Any) -> None:
        """After the last step, if the training ends sooner than it could."""
        self.finish()

    def on_exception(self, *_args: Any) -> None:
        """When the training fails or is asked to stop, print the line of a step that ended well."""
        with contextlib.suppress(RuntimeError):
            self.finish()
