"""Clip random gradients as Megatron-Core does and as the optimization async_step does, on the CPU.

Out: JSON, for each case the norm, and whether norm, logged norm and gradients have the same bits.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from megatron.core.optimizer import clip_grads, optimizer

SHAPES = ((7, 33), (256,), (1,), (64, 40))
CASES = [10.0**exponent for exponent in range(-6, 5)] + [0.0, float("inf"), float("nan")]


class Gradient(torch.Tensor):
    """A gradient that Megatron-Core takes for one on a GPU."""

    def type(self, *_args):
        return "torch.cuda.FloatTensor"


def gradients(seed: int, scale: float) -> list[SimpleNamespace]:
    """Parameters; the first value of the last gradient is the scale itself."""
    generator = torch.Generator().manual_seed(seed)
    finite = scale if scale < float("inf") else 1.0
    values = [torch.randn(shape, generator=generator) * finite for shape in SHAPES]
    values[-1][0, 0] = scale
    without = SimpleNamespace(grad=None)
    return [SimpleNamespace(grad=value.as_subclass(Gradient)) for value in values] + [without]


def clipped(module, seed: int, scale: float, highest: float):
    """The norm, and the bits of the gradients after clipping."""
    parameters = gradients(seed, scale)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = module.get_grad_norm_fp32(grads, grad_stats_parallel_group=None)
    module.clip_grad_by_total_norm_fp32(parameters, highest, norm)
    return norm, torch.cat([grad.as_subclass(torch.Tensor).flatten() for grad in grads]).view(torch.int32)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from runtime.engines.nemo import cpu

    cpu.stand_in()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from runtime.engines.nemo.optimizations import async_step

    async_step.install()
    for number, scale in enumerate(CASES * 20):
        highest = (1.0, 0.3)[number % 2]
        norm, bits = clipped(clip_grads, number, scale, highest)  # what async_step has left as it was
        late, late_bits = clipped(optimizer, number, scale, highest)
        logged = torch.tensor(norm).view(torch.int32)  # as NeMo logs it
        same = [torch.equal(late.view(torch.int32), logged), torch.equal(bits, late_bits)]
        print(json.dumps({"norm": str(norm), "coefficient": highest / (norm + 1e-6), "same": same}))


if __name__ == "__main__":
    main()
