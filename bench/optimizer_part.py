"""What an SFT step on two GPUs would take on more of them. In: a profile of bench/kernels.py. Out: times in milliseconds.

    python bench/optimizer_part.py OUT.json [--gpus 4]

Reads OUT.json (the step time without the profiler) and OUT.trace.json.gz beside it (the kernels of four steps of rank 0).

`optimizer` is the time of the optimizer's kernels: the norm of the gradients, their scaling, Adam, and the copies and casts
of shards. They run between the last matrix product of a backward pass and the first of the next forward pass, and their
names match SHARDS. Each GPU updates its own shard of the weights, so `gpus` GPUs need 2 / gpus of this time each.
`exposed` is the time in which NCCL's kernels run and no other kernel does.

    step on gpus = step - optimizer * (1 - 2 / gpus)

This is the time to compare with a goal for that many GPUs. It assumes that communication takes as long as on two. In a ring,
a link carries (n - 1) / n of the bytes: 1/2 on two GPUs, 3/4 on four. So the last row adds
`exposed * (2 * (gpus - 1) / gpus - 1)`: all communication that is not hidden on two GPUs, and as fast a link.
"""

import argparse
import gzip
import json
import re
from pathlib import Path
from typing import Any

from kernels import MARK, ON_GPU, STEPS, busy

PRODUCT = re.compile("nvjet|gemm|cutlass|cublas")
SHARDS = re.compile("multi_tensor|l2norm|copy|Memcpy DtoD|cast|quantize|reciprocal", re.IGNORECASE)
ADAM = re.compile("adam", re.IGNORECASE)


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("profile", type=Path)
    parser.add_argument("--gpus", type=int, default=4)
    options = parser.parse_args()
    step = json.loads(options.profile.read_text())["wall_without_profiler_s"]
    with gzip.open(options.profile.with_suffix(".trace.json.gz"), "rt") as text:
        events = json.load(text)["traceEvents"]
    optimizer, exposed = parts(events)
    fewer = step - optimizer * (1 - 2 / options.gpus)
    rows = {
        "step on two GPUs": step,
        "optimizer": optimizer,
        "exposed communication": exposed,
        f"step on {options.gpus} GPUs": fewer,
        f"step on {options.gpus} GPUs, slower links": fewer + exposed * (2 * (options.gpus - 1) / options.gpus - 1),
    }
    for name, seconds in rows.items():
        print(f"{name:32}{seconds * 1e3:10.1f}")


def parts(events: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds a step of the optimizer's kernels, and of communication beside which nothing runs."""
    kernels = [event for event in events if event.get("ph") == "X" and event.get("cat") in ON_GPU]
    kernels = sorted((kernel for kernel in kernels if MARK not in kernel["name"]), key=lambda kernel: kernel["ts"])
    others = [kernel for kernel in kernels if "nccl" not in kernel["name"]]
    return _optimizer(others) / 1e6 / STEPS, (sum(busy(kernels)) - sum(busy(others))) / 1e6 / STEPS


def _optimizer(kernels: list[dict[str, Any]]) -> float:
    """Microseconds of the optimizer's kernels: those with its names, between the matrix products around Adam."""
    total, since, has_adam = 0.0, 0.0, False
    for kernel in [*kernels, {"name": "gemm"}]:
        if PRODUCT.search(kernel["name"]):
            total += since if has_adam else 0.0
            since, has_adam = 0.0, False
        elif SHARDS.search(kernel["name"]):
            since += kernel["dur"]
            has_adam = has_adam or ADAM.search(kernel["name"]) is not None
    return total


if __name__ == "__main__":
    main()
