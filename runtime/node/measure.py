"""Measure the GPUs of this node: a GEMM, a copy in their memory, one from the host, an all-reduce between them.

In: a function that is called while the GEMMs run. Out: figures of each GPU, and the bandwidth of the all-reduce. All GPUs
multiply at the same time, as in a training, so that a power limit or the heat of neighbours shows.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

SIZE = 8192  # of the square matrices: 1.1 TFLOP, large enough for every GPU's best rate
WARM, TIMED = 100, 800  # GEMMs: an H200 takes 1.4 s. A GPU takes about 1,000 launches at a time
COPY_BYTES, COPIES = 1 << 30, 40
HOST_BYTES, HOST_COPIES = 256 << 20, 6
REDUCE_BYTES, REDUCTIONS = 256 << 20, 10


def count() -> int:
    """The GPUs that PyTorch finds."""
    import torch

    return int(torch.cuda.device_count())


def gemms(at_work: Callable[[], None]) -> list[dict[str, float]]:
    """TFLOP/s of each GPU in BF16. `at_work` is called while they run."""
    import torch

    timers = []
    for device in range(count()):
        with torch.cuda.device(device):
            # of random numbers, as in a training: zeros need less power, and run faster
            left, right = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            result = torch.empty_like(left)
            for _ in range(3):  # choose and load the kernel
                torch.mm(left, right, out=result)
            torch.cuda.synchronize()
            timers.append((left, right, result, *(torch.cuda.Event(enable_timing=True) for _ in range(2))))
    for number in range(WARM + TIMED):
        for device, (left, right, result, begin, _) in enumerate(timers):
            with torch.cuda.device(device):
                if number == WARM:
                    begin.record()
                torch.mm(left, right, out=result)
    for device, (*_, end) in enumerate(timers):
        with torch.cuda.device(device):
            end.record()
    at_work()
    for device in range(count()):
        torch.cuda.synchronize(device)
    return [{"gemm_tflops": 2e-12 * SIZE**3 * TIMED / _seconds(begin, end)} for *_, begin, end in timers]


def copies() -> list[dict[str, float]]:
    """GB/s of each GPU: in its memory, counting what is read and what is written, and from pinned memory of the host."""
    import torch

    found = []
    for device in range(count()):
        with torch.cuda.device(device):
            here, there = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
            host = torch.empty(HOST_BYTES, dtype=torch.uint8, pin_memory=True)
            inside = _timed(partial(there.copy_, here), COPIES)
            outside = _timed(partial(here[:HOST_BYTES].copy_, host, non_blocking=True), HOST_COPIES)
            found.append({"copy_gb_per_s": 2e-9 * COPY_BYTES / inside, "host_gb_per_s": 1e-9 * HOST_BYTES / outside})
    return found


def all_reduce() -> float | None:
    """GB/s of an all-reduce between the GPUs, as bus bandwidth: 2 (n-1)/n of the bytes. None for one GPU.

    RuntimeError: the sum is wrong, or NCCL fails.
    """
    import torch
    from torch.cuda import nccl

    gpus = count()
    if gpus < 2:
        return None
    small = [torch.full((1024,), float(device + 1), device=f"cuda:{device}") for device in range(gpus)]
    nccl.all_reduce(small)
    if any((tensor != gpus * (gpus + 1) / 2).any().item() for tensor in small):
        raise RuntimeError("the all-reduce inside the node gives a wrong sum")
    tensors = [torch.zeros(REDUCE_BYTES // 2, dtype=torch.bfloat16, device=f"cuda:{device}") for device in range(gpus)]

    def reduce(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            nccl.all_reduce(tensors)
        for device in range(gpus):
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / times

    reduce(2)
    return 2e-9 * (gpus - 1) / gpus * REDUCE_BYTES / reduce(REDUCTIONS)


def _timed(work: Callable[[], Any], times: int) -> float:
    """Seconds of the work, once it is warm."""
    import torch

    work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return _seconds(begin, end) / times


def _seconds(begin: Any, end: Any) -> float:
    return float(begin.elapsed_time(end)) / 1000
