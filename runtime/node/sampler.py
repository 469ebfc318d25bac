"""Write the telemetry of this node's GPUs into a file: the program that `telemetry.py` starts once on each node.

    python -m runtime.node.sampler FILE NODE GPUS PARENT

In: on stdin, a line `STEP TIME` for the end of each step. Out: lines of JSON, appended to FILE: a head with "gpus", then a
sample a second with a list of each figure, one value for each GPU, and a line for each step. TIME and "time_s" are seconds
since 1970, UTC. Exit code: 1, no NVML; else the number of the error with which FILE could not be written.

The program ends when its stdin ends or process PARENT is gone, so with the training, whatever ends that. `telemetry.py`
starts it with the job's signals blocked: Slurm sends them to every process, and the training decides what they mean.
"""

import json
import os
import select
import sys
import time
from typing import Any

from runtime.node import smi
from runtime.node.nvml import FIGURES, Handle, Nvml, NvmlError

FORMAT = 1
INTERVAL_S = 1.0
NO_NVML = 1
LAZY = 19  # the least that a scheduler gives


def main(file: str, node: str, wanted: int, parent: int) -> int:
    """Sample until the training ends."""
    os.nice(LAZY)
    try:
        nvml = Nvml()
        gpus = chosen(nvml, wanted)
    except NvmlError as error:
        print(f"ftgen: no telemetry of node {node}: {error}", flush=True)
        return NO_NVML
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the log must not wait for this process
    os.dup2(1, 2)
    try:
        with open(file, "ab", buffering=0) as output:  # noqa: PTH123 - unbuffered: nothing is lost when it is killed
            if output.tell():
                output.write(b"\n")  # the last line of an attempt that was killed may be torn
            _write(output, {"format": FORMAT, "node": node, "interval_s": INTERVAL_S, "gpus": [facts for _, facts in gpus]})
            _sample(nvml, [gpu for gpu, _ in gpus], output, parent)
    except OSError as error:
        return error.errno or NO_NVML
    return 0


def chosen(nvml: Nvml, wanted: int) -> list[tuple[Handle, dict[str, str | None]]]:
    """The GPUs of the training: as many as it has here, of those that CUDA_VISIBLE_DEVICES names. NvmlError: none."""
    if "MIG-" in os.environ.get("CUDA_VISIBLE_DEVICES", ""):
        raise NvmlError("a part of a GPU (MIG) has no power of its own")
    found = nvml.gpus()
    seen = [facts["uuid"] for facts in smi.visible([facts for _, facts in found])]
    gpus = [(gpu, facts) for gpu, facts in found if facts["uuid"] in seen][:wanted]
    if not gpus:
        raise NvmlError("NVML finds no GPU")
    return gpus


def _sample(nvml: Nvml, gpus: list[Handle], output: Any, parent: int) -> None:
    due, told = time.monotonic(), b""
    while os.getppid() == parent:
        _write(output, sample(nvml, gpus))
        due = max(due + INTERVAL_S, time.monotonic())  # a driver that was slow is not asked twice at once
        while (left_s := due - time.monotonic()) > 0:
            if select.select([0], [], [], left_s)[0]:
                if not (more := os.read(0, 65536)):
                    return
                *lines, told = (told + more).split(b"\n")
                for line in lines:
                    step, time_s = line.split()
                    _write(output, {"step": int(step), "time_s": float(time_s)})


def sample(nvml: Nvml, gpus: list[Handle]) -> dict[str, Any]:
    """The time, and for each figure a list with the value of each GPU."""
    time_s = round(time.time(), 3)
    found = [nvml.figures(gpu) for gpu in gpus]
    return {"time_s": time_s, **{name: [figures[name] for figures in found] for name in FIGURES}}


def _write(output: Any, line: dict[str, Any]) -> None:
    output.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
