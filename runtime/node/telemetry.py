"""Record power, clocks and temperature of the GPUs while a training runs, and when its steps end.

In: a plan. Out: `telemetry.<node>.jsonl` beside the log, which a process of its own writes (`sampler.py`).

The first rank of a node starts the sampler and tells it the end of each step through a pipe that never blocks. Whatever
becomes of the sampler, the training goes on. The sampler ends when the pipe ends, and that ends with this process.

Environment: LOCAL_RANK, RANK, FTGEN_RUN_DIR.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from runtime.job import signals
from runtime.job.places import run_directory
from runtime.job.progress import say
from runtime.node.check import name
from runtime.node.sampler import NO_NVML

Plan = dict[str, Any]


class Sampler:
    """The process, as far as the training needs it."""

    def __init__(self, process: "subprocess.Popen[bytes]", pipe: int) -> None:
        self.process, self.pipe = process, pipe
        self.began = False  # whether the beginning of the first step was told

    def tell(self, step: int, time_s: float) -> None:
        """Tell when a step ended. OSError: nobody listens, or not fast enough."""
        os.write(self.pipe, f"{step} {time_s:.3f}\n".encode())


_running: list[Sampler] = []


def begin(plan: Plan) -> None:
    """Start the sampler, on the first rank of a node, if the plan has GPUs and does not refuse it."""
    if not plan["telemetry"] or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if plan["gpu"]["name"] == "cpu":
        say("no telemetry: the run has no GPU")
        return
    try:
        _running[:] = [_start(run_directory() / f"telemetry.{name()}.jsonl", plan["gpus_per_node"])]
    except OSError as error:
        _warn(f"its sampler cannot be started: {error.strerror}")


def is_on() -> bool:
    """Whether this process has a sampler."""
    return bool(_running)


def before_step(step: int) -> None:
    """Tell the sampler when the first step of this process begins: at the end of the one before it."""
    if _running and not _running[0].began:
        _running[0].began = True
        after_step(step - 1)


def after_step(step: int, time_s: float | None = None) -> None:
    """Tell the sampler that a step, counted from 0, has ended: now, or at this time in seconds since 1970."""
    if not _running:
        return
    try:
        _running[0].tell(step, time.time() if time_s is None else time_s)
    except OSError:
        _tell_why(_running.pop())


def _start(file: Path, gpus: int) -> Sampler:
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    file.parent.mkdir(parents=True, exist_ok=True)
    theirs, ours = os.pipe()
    os.set_blocking(ours, False)
    try:
        with signals.blocked():
            process = subprocess.Popen(
                # without site: it needs no package, and in some environments that takes seconds
                [sys.executable, "-S", "-m", "runtime.node.sampler", str(file), name(), str(gpus), str(os.getpid())],
                stdin=theirs,
                env=os.environ | {"PYTHONPATH": path},
            )
    finally:
        os.close(theirs)
    return Sampler(process, ours)


def _tell_why(sampler: Sampler) -> None:
    """Why the sampler does not listen. Without NVML, it has said so itself."""
    os.close(sampler.pipe)
    code = sampler.process.poll()
    if code is None:
        _warn("its sampler does not keep up with the steps, and was told to end")
    elif code != NO_NVML:
        _warn(f"its sampler ended: {os.strerror(code) if code > 0 else f'signal {-code}'}")


def _warn(why: str) -> None:
    say(f"warning: no telemetry of node {name()} from here on: {why}", any_rank=True)
