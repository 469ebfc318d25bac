"""Where a step's GPU time goes. In: a compiled entrypoint. Out: JSON with wall time, kernel time and the kernels.

    python bench/kernels.py UNPACKED/NAME.py OUT.json

Trains twenty steps as `NAME.py finetune` does and looks at the last four with the PyTorch profiler. Seconds a step.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from record import load

FIRST, STEPS = 16, 4


def main(entrypoint: Path, output: Path) -> int:
    """Train and profile; the training's exit status."""
    module = load(entrypoint)
    from runtime import finetune, recipe

    build = recipe.build

    def build_and_profile(plan: dict[str, Any], *args: Any) -> Any:
        import nemo_run as run

        built = build(plan | {"max_steps": FIRST + STEPS}, *args)
        built.trainer.callbacks.append(run.Config(_profiler(), output=str(output)))
        return built

    recipe.build = build_and_profile
    return finetune.finetune(module.PLAN)


def _profiler() -> type:
    import torch
    from lightning.pytorch.callbacks import Callback

    class Profiler(Callback):
        """Profiles the last steps."""

        def __init__(self, output: str) -> None:
            self.output = Path(output)

        def on_train_batch_start(self, _trainer: Any, _module: Any, _batch: Any, index: int) -> None:
            if index == FIRST:
                activities = [torch.profiler.ProfilerActivity.CUDA]
                self.profile = torch.profiler.profile(activities=activities)
                torch.cuda.synchronize()
                self.profile.__enter__()
                self.begin = time.perf_counter()

        def on_train_batch_end(self, *_args: Any) -> None:
            if _args[-1] != FIRST + STEPS - 1:
                return
            torch.cuda.synchronize()
            wall = time.perf_counter() - self.begin
            self.profile.__exit__(None, None, None)
            spans = [(e.name, e.time_range.start, e.time_range.end) for e in self.profile.events() if _on_gpu(e)]
            self.output.write_text(json.dumps(_figures(wall, spans), indent=1))

    globals()["Profiler"] = Profiler
    Profiler.__qualname__ = "Profiler"
    return Profiler


def _on_gpu(event: Any) -> bool:
    return str(event.device_type).endswith("CUDA")


def _figures(wall: float, spans: list[tuple[str, float, float]]) -> dict[str, Any]:
    """Seconds a step: wall clock, GPU busy with anything, and by kernel; spans in microseconds."""
    by_kernel: Counter[str] = Counter()
    busy, until = 0.0, float("-inf")
    for name, begin, end in sorted(spans, key=lambda span: span[1]):
        by_kernel[name] += end - begin
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    count = Counter(name for name, _, _ in spans)
    rows = [
        {"kernel": name[:160], "seconds_a_step": total / 1e6 / STEPS, "launches_a_step": count[name] / STEPS}
        for name, total in by_kernel.most_common(60)
    ]
    return {"wall_s": wall / STEPS, "busy_s": busy / 1e6 / STEPS, "launches_a_step": len(spans) / STEPS, "kernels": rows}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
