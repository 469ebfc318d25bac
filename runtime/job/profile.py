"""Profile some steps of some ranks.

In: plan["profile"]. Out: one file per profiled rank in $FTGEN_RUN_DIR/profile.

With the tool "nsys", the process restarts as a child of Nsight Systems, which records from cudaProfilerStart to
cudaProfilerStop. With "pytorch", torch.profiler records and writes a Chrome trace. Steps are counted from 0, as in
the log.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from runtime.job.errors import JobError
from runtime.job.places import run_directory
from runtime.job.progress import say

Plan = dict[str, Any]
INSIDE = "FTGEN_INSIDE_NSYS"  # set for the process that Nsight Systems started


def wanted(plan: Plan) -> bool:
    """Whether the plan profiles the rank of this process."""
    return bool(plan.get("profile")) and int(os.environ.get("RANK", "0")) in plan["profile"]["ranks"]


def file(plan: Plan) -> Path:
    """Path of this rank's profile, without the suffix."""
    steps = f"steps_{plan['profile']['first_step']}-{plan['profile']['last_step']}"
    return Path(run_directory(), "profile", f"{steps}_rank_{os.environ.get('RANK', '0')}")


def enter(plan: Plan) -> None:
    """Restart this process under Nsight Systems, if the plan asks for it. JobError: nsys is not installed."""
    if not wanted(plan) or plan["profile"]["tool"] != "nsys" or INSIDE in os.environ:
        return
    nsys = shutil.which("nsys")
    if not nsys:
        raise JobError("nsys is not installed on this node", 'install Nsight Systems, or set profile.tool = "pytorch"')
    file(plan).parent.mkdir(parents=True, exist_ok=True)
    os.environ[INSIDE] = "1"
    options = ["--trace=cuda,nvtx", "--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--force-overwrite=true"]
    command = [nsys, "profile", *options, f"--output={file(plan)}", sys.executable, *sys.argv]
    say("profiling: " + " ".join(command))
    sys.stdout.flush()
    os.execv(nsys, command)  # noqa: S606 - the profiler replaces this process


def arguments(plan: Plan) -> tuple[str, int, int, str]:
    """The arguments of `runtime.job.profiler.Profiler`."""
    asked = plan["profile"]
    return asked["tool"], asked["first_step"], asked["last_step"], str(file(plan))
