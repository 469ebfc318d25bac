"""Where a step's GPU time goes. In: a compiled entrypoint. Out: JSON with wall time, kernel time and the kernels.

    python bench/kernels.py UNPACKED/NAME.py OUT.json [--random]

Trains twenty steps as `NAME.py finetune` does and looks at the last four with the PyTorch profiler, on rank 0. Seconds a
step. Beside OUT.json a Chrome trace of these steps is left, OUT.trace.json.gz. `--random` starts from random weights instead
of the converted checkpoint: kernels take the same time.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from record import load, start_from_random

FIRST, STEPS = 16, 4


def main() -> int:
    """Train and profile; the training's exit status."""
    options = _options()
    module = load(options.entrypoint, options.random)
    from runtime.engines.nemo import recipe, train

    build = recipe.build

    def build_and_profile(plan: dict[str, Any], *args: Any) -> Any:
        import nemo_run as run

        built = build(plan | {"max_steps": FIRST + STEPS}, *args)
        if options.random:
            start_from_random(built, args[0])
        built.trainer.callbacks.append(run.Config(_profiler(), output=str(options.output)))
        return built

    recipe.build = build_and_profile  # type: ignore[assignment] # train.py calls it by this name
    return train.train(module.PLAN)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("entrypoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--random", action="store_true")
    return parser.parse_args()


def _profiler() -> type:
    import torch
    from lightning.pytorch.callbacks import Callback

    class Profiler(Callback):  # type: ignore[misc]
        """Profiles the last steps."""

        def __init__(self, output: str) -> None:
            self.output, self.rank = Path(output), int(os.environ.get("RANK", "0"))
            self.begins: list[float] = []

        def on_train_batch_start(self, *_args: Any) -> None:
            torch.cuda.synchronize()
            self.begins.append(time.perf_counter())
            if len(self.begins) == FIRST + 1 and self.rank == 0:
                self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profile.__enter__()
                self.begin = time.perf_counter()

        def on_train_batch_end(self, *_args: Any) -> None:
            if len(self.begins) != FIRST + STEPS or self.rank != 0:
                return
            torch.cuda.synchronize()
            wall = time.perf_counter() - self.begin
            self.profile.__exit__(None, None, None)
            spans = [(e.name, e.time_range.start, e.time_range.end) for e in self.profile.events() if _on_gpu(e)]
            self.output.write_text(json.dumps(_figures(wall, spans, self.begins[: FIRST + 1]), indent=1))
            self.profile.export_chrome_trace(str(self.output.with_suffix(".trace.json.gz")))

    globals()["Profiler"] = Profiler
    Profiler.__qualname__ = "Profiler"
    return Profiler


def _on_gpu(event: Any) -> bool:
    return str(event.device_type).endswith("CUDA")


def _figures(wall: float, spans: list[tuple[str, float, float]], begins: list[float]) -> dict[str, Any]:
    """Seconds a step: by the clock with and without the profiler, GPU busy at all, and by kernel; spans in microseconds."""
    by_kernel: defaultdict[str, float] = defaultdict(float)
    busy, until = 0.0, float("-inf")
    for name, begin, end in sorted(spans, key=lambda span: span[1]):
        by_kernel[name] += end - begin
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    count = Counter(name for name, _, _ in spans)
    rows = [
        {"kernel": name[:160], "seconds_a_step": total / 1e6 / STEPS, "launches_a_step": count[name] / STEPS}
        for name, total in sorted(by_kernel.items(), key=lambda item: -item[1])[:60]
    ]
    before = [end - begin for begin, end in zip(begins[-9:], begins[-8:], strict=False)]
    return {
        "wall_s": wall / STEPS,
        "wall_without_profiler_s": statistics.mean(before),
        "busy_s": busy / 1e6 / STEPS,
        "launches_a_step": len(spans) / STEPS,
        "kernels": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
