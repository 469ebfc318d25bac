"""Where a step's GPU time goes. In: a compiled entrypoint. Out: JSON with wall time, kernel time, the kernels and the gaps.

    python bench/kernels.py UNPACKED/NAME.py OUT.json [--random] [--host]

Trains twenty steps as `NAME.py finetune` does and looks at the last four with the PyTorch profiler, on rank 0. Seconds a
step. Beside OUT.json a Chrome trace of these steps is left, OUT.trace.json.gz. `--random` starts from random weights instead
of the converted checkpoint: kernels take the same time.

`gaps` says how long no kernel ran: between the end of a step's backward pass and the first layer of the next step
(`between_steps`), and at all other times (`elsewhere`). Two kernels that do nothing mark these places. `waits` lists the
calls in which the host waited for the GPU. `--host` also records PyTorch's operators and every Python function: `waits` then
says who called, and `host` what the host did between steps. Python is slower then, so take the gaps from a run without it.
"""

import argparse
import gzip
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from record import load, start_from_random

FIRST, STEPS, BEFORE = 16, 4, 8
MARK = "spin_kernel"  # the kernel of torch.cuda._sleep
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
WAITS = ("Synchronize", "cudaMemcpy", "cudaMalloc", "cudaFree", "cudaHostAlloc")

Event = dict[str, Any]


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
        built.trainer.callbacks.append(run.Config(_profiler(), output=str(options.output), host=options.host))
        return built

    recipe.build = build_and_profile  # type: ignore[assignment] # train.py calls it by this name
    return train.train(module.PLAN)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("entrypoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--host", action="store_true")
    return parser.parse_args()


def _profiler() -> type:
    import torch
    from lightning.pytorch.callbacks import Callback
    from megatron.core.transformer.transformer_block import TransformerBlock
    from nemo.lightning.pytorch.optim import MegatronOptimizerModule
    from torch.profiler import ProfilerActivity

    class Profiler(Callback):  # type: ignore[misc]
        """Profiles the last steps."""

        def __init__(self, output: str, host: bool) -> None:
            self.output, self.host = Path(output), host
            self.begun, self.marked = 0, True
            self.begins: list[float] = []
            self.profile: Any = None
            TransformerBlock.forward = self._after_a_mark(TransformerBlock.forward, once=True)
            finalize = MegatronOptimizerModule.finalize_model_grads
            MegatronOptimizerModule.finalize_model_grads = self._after_a_mark(finalize, once=False)

        def on_train_batch_start(self, *_args: Any) -> None:
            if self.begun in (FIRST - BEFORE, FIRST):
                torch.cuda.synchronize()
                self.begins.append(time.perf_counter())
            if self.begun == FIRST and os.environ.get("RANK", "0") == "0":
                activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if self.host else [ProfilerActivity.CUDA]
                self.profile = torch.profiler.profile(activities=activities, with_stack=self.host)
                self.profile.__enter__()
                self.begin = time.perf_counter()
            self.begun, self.marked = self.begun + 1, False

        def on_train_batch_end(self, *_args: Any) -> None:
            if self.begun != FIRST + STEPS or not self.profile:
                return
            torch.cuda.synchronize()
            wall, before = time.perf_counter() - self.begin, self.begins[1] - self.begins[0]
            self.profile.__exit__(None, None, None)
            trace = self.output.with_suffix(".trace.json.gz")
            self.profile.export_chrome_trace(str(trace))
            with gzip.open(trace, "rt") as text:
                events = [event for event in json.load(text)["traceEvents"] if event.get("ph") == "X"]
            self.output.write_text(json.dumps(figures(wall, before, events), indent=1))

        def _after_a_mark(self, function: Any, once: bool) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if self.profile and not (once and self.marked):
                    torch.cuda._sleep(1)
                self.marked = True
                return function(*args, **kwargs)

            return call

    globals()["Profiler"] = Profiler
    Profiler.__qualname__ = "Profiler"
    return Profiler


def figures(wall: float, before: float, events: list[Event]) -> dict[str, Any]:
    """Seconds a step: by the clock with and without the profiler, GPU busy at all, by kernel, and the gaps.

    `before`: seconds of the steps before the profiled ones. `events`: the complete events of a Chrome trace.
    """
    on_gpu = sorted((e for e in events if e.get("cat") in ON_GPU), key=lambda event: event["ts"])
    calls = [event for event in events if event.get("cat") in CALLS]
    marks = [event for event in on_gpu if MARK in event["name"]]
    spans = [event for event in on_gpu if MARK not in event["name"]]
    launches = {call["args"].get("correlation"): call["ts"] for call in calls}
    launched = [launches.get(mark["args"].get("correlation"), mark["ts"]) for mark in marks]
    by_kernel: defaultdict[str, float] = defaultdict(float)
    for event in spans:
        by_kernel[event["name"]] += event["dur"]
    count = Counter(event["name"] for event in spans)
    kernels = [
        {"kernel": name[:160], "seconds_a_step": _a_step(total), "launches_a_step": count[name] / STEPS}
        for name, total in sorted(by_kernel.items(), key=lambda item: -item[1])[:60]
    ]
    # The marks are: the first layer of a step, the end of its backward pass, the first layer of the next ...
    pairs = list(zip(marks[1::2], marks[2::2], strict=False))
    windows = [(_last_before(end["ts"], spans), _first_after(first["ts"], spans)) for end, first in pairs]
    host_windows = list(zip(launched[1::2], launched[2::2], strict=False))
    ahead = [(mark["ts"] - launch) / 1e6 for mark, launch in zip(marks, launched, strict=True)]
    gaps = _gaps(spans)
    between = [gap for gap in gaps if _inside(gap["ts"], windows)]
    return {
        "wall_s": wall / STEPS,
        "wall_without_profiler_s": before / BEFORE,
        "busy_s": _a_step(sum(busy(spans))),
        "launches_a_step": len(spans) / STEPS,
        "gaps": {
            # between four steps there are three times
            "between_steps_s": _each(sum(gap["dur"] for gap in between), windows),
            "between_steps_with_kernels_s": _each(sum(end - begin for begin, end in windows), windows),
            "elsewhere_s": _a_step(sum(gap["dur"] for gap in gaps) - sum(gap["dur"] for gap in between)),
            # how long before a kernel at these places the host launched it
            "host_ahead_at_first_layer_s": ahead[::2],
            "host_ahead_at_end_of_backward_s": ahead[1::2],
            "longest_between": _grouped(between, len(windows)),
            "longest_elsewhere": _grouped([gap for gap in gaps if not _inside(gap["ts"], windows)], STEPS),
        },
        "waits": _waits(calls, events, host_windows),
        "host": _host(events, host_windows),
        "kernels": kernels,
    }


def _a_step(microseconds: float) -> float:
    return microseconds / 1e6 / STEPS


def _each(microseconds: float, windows: list[Any]) -> float | None:
    return microseconds / 1e6 / len(windows) if windows else None


def _inside(moment: float, windows: Iterable[Any]) -> bool:
    return any(begin <= moment < end for begin, end in windows)


def _last_before(moment: float, spans: list[Event]) -> float:
    """When the kernels that began before this moment had ended, if that was earlier."""
    ends = (event["ts"] + event["dur"] for event in spans if event["ts"] < moment)
    return float(min(moment, max(ends, default=moment)))


def _first_after(moment: float, spans: list[Event]) -> float:
    """When the next kernel began."""
    return float(next((event["ts"] for event in spans if event["ts"] >= moment), moment))


def busy(spans: list[Event]) -> Iterable[float]:
    """How long each event makes the GPU busy that was not busy already; the events sorted by their beginning."""
    until = float("-inf")
    for event in spans:
        yield max(0.0, event["ts"] + event["dur"] - max(event["ts"], until))
        until = max(until, event["ts"] + event["dur"])


def _gaps(spans: list[Event]) -> list[Event]:
    """The times without a kernel, each with the kernels before and after it."""
    gaps: list[Event] = []
    last = spans[0] if spans else {}
    for event in spans[1:]:
        until = last["ts"] + last["dur"]
        if event["ts"] > until:
            names = f"{last['name'][:80]} -> {event['name'][:80]}"
            gaps.append({"ts": until, "dur": event["ts"] - until, "name": names})
        if event["ts"] + event["dur"] > until:
            last = event
    return gaps


def _grouped(gaps: list[Event], times: int) -> list[dict[str, Any]]:
    """The gaps between the same kernels, those that last longest in total."""
    total: defaultdict[str, float] = defaultdict(float)
    for gap in gaps:
        total[gap["name"]] += gap["dur"]
    count = Counter(gap["name"] for gap in gaps)
    ordered = sorted(total.items(), key=lambda item: -item[1])[:25]
    return [{"kernels": name, "seconds": took / 1e6 / max(1, times), "times": count[name]} for name, took in ordered]


def _waits(calls: list[Event], events: list[Event], windows: list[Any]) -> list[dict[str, Any]]:
    """The calls that can wait for the GPU, by name, place and caller; the longest first."""
    waits = [call for call in calls if any(name in call["name"] for name in WAITS)]
    functions = [event for event in events if event.get("cat") == "python_function"]
    rows: defaultdict[Any, list[float]] = defaultdict(list)
    running: defaultdict[Any, list[Event]] = defaultdict(list)  # by thread
    for event in sorted(functions + waits, key=lambda event: (event["ts"], -event["dur"])):
        stack = running[event["tid"]]
        while stack and stack[-1]["ts"] + stack[-1]["dur"] < event["ts"]:
            stack.pop()
        if event["cat"] == "python_function":
            stack.append(event)
            continue
        place = "between steps" if _inside(event["ts"], windows) else "elsewhere"
        callers = tuple(function["name"] for function in stack[:-9:-1])
        rows[event["name"], place, callers].append(event["dur"])
    ordered = sorted(rows.items(), key=lambda item: -sum(item[1]))[:60]
    return [
        {
            "call": name,
            "place": place,
            "seconds_a_step": _a_step(sum(took)),
            "times_a_step": len(took) / STEPS,
            "callers": callers,
        }
        for (name, place, callers), took in ordered
    ]


def _host(events: list[Event], windows: list[Any]) -> dict[str, Any]:
    """What the host did between launching a step's last backward kernel and the next step's first layer."""
    took: defaultdict[str, float] = defaultdict(float)
    times: Counter[str] = Counter()
    for event in events:
        if event.get("cat") not in ("python_function", "cpu_op", *CALLS):
            continue
        for begin, end in windows:
            overlap = min(end, event["ts"] + event["dur"]) - max(begin, event["ts"])
            if overlap > 0 and event["ts"] >= begin:  # not what contains whole steps
                took[event["name"]] += overlap
                times[event["name"]] += 1
    ordered = sorted(took.items(), key=lambda item: -item[1])[:120]
    return {
        "between_steps_s": _each(sum(end - begin for begin, end in windows), windows),
        "functions": [
            {"name": name[:200], "seconds": _each(total, windows), "times": times[name] / len(windows)}
            for name, total in ordered
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
