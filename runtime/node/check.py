"""Check this node: the program that `beside.py` starts once on each node.

In: on stdin, JSON with the plan's gpu, gpus_per_node and node_check. Out: on stdout, a line with RESULT and JSON: what was
found, and the problems. The program has the GPUs for itself and its memory is free again when it ends.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.node import judge, measure, smi

RESULT = "ftgen node check: "
WELL, BAD, NO_GPU = "well", "bad", "no GPU"
FIGURES = ("gemm_tflops", "copy_gb_per_s", "host_gb_per_s")

Found = dict[str, Any]


def main() -> None:
    """Check, and print what was found."""
    asked = json.loads(sys.stdin.read())
    begin = time.monotonic()
    found = check(asked["gpu"]["name"], asked["gpus_per_node"], asked["node_check"]["expected"])
    found["seconds"] = round(time.monotonic() - begin, 1)
    print(RESULT + json.dumps(found), flush=True)


def check(gpu: str, wanted: int, expected: dict[str, Any]) -> Found:
    """What was found of this node."""
    node: Found = {"node": name(), "state": NO_GPU, "problems": [], "host": host()}
    if gpu == "cpu":
        return node
    gpus, problems = _asked()
    all_reduce, more = _measured(gpus)
    problems += [*more, *judge.problems(gpus, wanted, expected), *judge.of_all_reduce(all_reduce, expected)]
    lowest = {figure: min((each[figure] for each in gpus if figure in each), default=None) for figure in FIGURES}
    return {
        **node,
        "state": BAD if problems else WELL,
        "gpu": next((each["name"] for each in gpus if each.get("name")), None),
        "gpus": len(gpus),
        **{figure: round(value, 1) for figure, value in {**lowest, "all_reduce_gb_per_s": all_reduce}.items() if value},
        "problems": problems,
        "devices": gpus,
    }


def name() -> str:
    """The name of this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def host() -> Found:
    """What the machine has besides GPUs: CPUs for us, free memory, load, the network's links."""
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    links = {
        path.parent.parent.parent.name: path.read_text().strip()
        for path in sorted(Path("/sys/class/infiniband").glob("*/ports/1/rate"))
    }
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "memory_free_gib": round(int(memory["MemAvailable"].split()[0]) / 2**20, 1),
        "load": os.getloadavg()[0],
        **({"infiniband": links} if links else {}),
    }


def _asked() -> tuple[list[Found], list[str]]:
    """What nvidia-smi says of each GPU at rest."""
    try:
        gpus: list[Found] = [dict(gpu) for gpu in smi.query(smi.AT_REST)]
        for gpu in gpus:
            gpu.update(next((rows for rows in smi.remapped_rows() if rows["uuid"] == gpu["uuid"]), {}))
        links = smi.nvlinks()
        for gpu in gpus:  # nvidia-smi counts all GPUs of the node here
            index = int(gpu["index"] or 0)
            gpu.update({"nvlinks": links[index]} if index < len(links) else {})
        return gpus, []
    except smi.SmiError as error:
        return [], [f"nvidia-smi: {error}"]


def _measured(gpus: list[Found]) -> tuple[float | None, list[str]]:
    """Add the figures to the GPUs; the all-reduce, and what failed. A GPU that fails is a finding, not an error of ours."""
    problems: list[str] = []

    def at_work() -> None:
        try:
            for gpu, facts in zip(gpus, smi.query(smi.AT_WORK), strict=False):
                gpu.update(facts)
        except smi.SmiError as error:
            problems.append(f"nvidia-smi under load: {error}")

    def part(what: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (RuntimeError, AssertionError) as error:  # PyTorch's for CUDA and NCCL
            problems.append(f"the {what} failed: {str(error).partition(chr(10))[0]}")
            return None

    seen = part("look for GPUs", measure.count) or 0
    gpus += [{} for _ in range(seen - len(gpus))]
    if not seen:
        return None, [*problems, "PyTorch finds no GPU"]
    for what, work in (("GEMM", lambda: measure.gemms(at_work)), ("copy", measure.copies)):
        for gpu, figures in zip(gpus, part(what, work) or [], strict=False):
            gpu.update(figures)
    return part("all-reduce", measure.all_reduce), problems


if __name__ == "__main__":
    main()
