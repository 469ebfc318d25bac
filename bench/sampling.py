"""What the telemetry of a job costs a training step. Needs a GPU. Out: JSON on stdout.

    python bench/sampling.py [--rounds 10] [--seconds 4] [--host]

A step replays a CUDA graph of matrix products, and takes about as long as a fast training step. It is repeated for some
seconds without the sampler of runtime/node/telemetry.py, then as long with it, in turn. The sampler is the program that a
job starts, and it is told the end of each step. With `--host`, a step replays many small graphs, so that the host limits
it, as in the stock recipe in FP8.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIZE = 8192  # of the matrices
PRODUCTS = 300  # a step: about 0.45 s on an H200, at 750 TFLOP/s
SMALL_SIZE, SMALL_PRODUCTS, SMALL_GRAPHS = 256, 4, 20_000
PLAN = {"telemetry": True, "gpu": {"name": "gpu"}, "gpus_per_node": 1}


def main() -> int:
    """Measure in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--host", action="store_true")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench/sampling.py: there is no GPU")
    sys.path.insert(0, str(ROOT))
    step = _step(torch, SMALL_GRAPHS, SMALL_PRODUCTS, SMALL_SIZE) if options.host else _step(torch, 1, PRODUCTS, SIZE)
    times: dict[bool, list[float]] = {False: [], True: []}
    samples = 0
    _measure(torch, step, options.seconds)  # to warm up
    for number in range(options.rounds):
        for sampled in (False, True) if number % 2 else (True, False):
            found, taken = _round(torch, step, options.seconds, sampled)
            times[sampled] += found
            samples += taken
    print(json.dumps(_figures(torch, times, samples), indent=1))
    return int(samples == 0)


def _step(torch: Any, graphs: int, products: int, size: int) -> Any:
    """A function that replays one captured graph of `products` matrix products, `graphs` times."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.mm(a, b)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(products):
            torch.mm(a, b, out=out)

    def replay() -> None:
        for _ in range(graphs):
            graph.replay()

    return replay


def _round(torch: Any, step: Any, seconds: float, sampled: bool) -> tuple[list[float], int]:
    """The times of the steps of one part, and how many samples were taken meanwhile."""
    from runtime.node import telemetry

    if not sampled:
        return _measure(torch, step, seconds), 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FTGEN_RUN_DIR"] = folder
        telemetry.begin(PLAN)
        time.sleep(1)  # it starts
        times = _measure(torch, step, seconds, telemetry.after_step)
        (sampler,) = telemetry._running  # gone, if it ended: then nothing was measured
        os.close(sampler.pipe)
        sampler.process.wait()
        telemetry._running.clear()
        lines = [line for file in Path(folder).glob("telemetry.*.jsonl") for line in file.read_text().splitlines()]
    return times, sum('"power_w"' in line for line in lines)


def _measure(torch: Any, step: Any, seconds: float, tell: Any = None) -> list[float]:
    """The times of steps for some seconds, each from synchronization to synchronization, without the first one."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        step()
        torch.cuda.synchronize()
        if tell:
            tell(len(times))
        times.append(time.perf_counter() - begin)
    return times[1:]


def _figures(torch: Any, times: dict[bool, list[float]], samples: int) -> dict[str, Any]:
    without, with_ = (statistics.mean(times[sampled]) for sampled in (False, True))
    errors = [statistics.stdev(found) / len(found) ** 0.5 for found in times.values()]
    return {
        "gpu": torch.cuda.get_device_name(),
        "steps": {"without": len(times[False]), "with": len(times[True])},
        "samples": samples,
        "step_time_s_without": round(without, 6),
        "step_time_s_with": round(with_, 6),
        "cost": round(with_ / without - 1, 6),
        "standard_error_of_cost": round(sum(error**2 for error in errors) ** 0.5 / without, 6),
    }


if __name__ == "__main__":
    sys.exit(main())
