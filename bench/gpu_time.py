"""How long a call takes on the GPU. In: a call. Out: microseconds, and what it gives."""

from collections.abc import Callable
from typing import Any

import torch


def both(call: Callable[..., Any], parts: list[Any], repeats: int) -> tuple[list[Any], list[float]]:
    """What a call gives and its gradients for `parts`, in float32; and the microseconds, forward and backward."""
    inputs = [part.detach().requires_grad_() for part in parts]
    found = call(*inputs)
    out = found if isinstance(found, tuple) else (found,)
    torch.manual_seed(1)
    gradients = [torch.randn_like(part) for part in out]
    back = torch.autograd.grad(out, inputs, gradients)
    forward = microseconds(lambda: call(*inputs), repeats)
    together = microseconds(lambda: torch.autograd.grad(call(*inputs), inputs, gradients), repeats)
    return [part.detach().float() for part in (*out, *back)], [forward, together - forward]


def microseconds(call: Callable[[], Any], repeats: int) -> float:
    """The time of a call in a CUDA graph of `repeats` calls."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(repeats):
            call()
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1000 / repeats
