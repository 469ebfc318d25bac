"""Check the node in a process of its own, beside the imports of the training, which take longer.

In: a plan. Out: a line in the log, `ftgen node: {...}`, a sentence for each problem, and the file nodes/<name>.json beside
the log. JobError if the node is not well and the plan says stop.

Environment: LOCAL_RANK (the first rank of a node checks for all), FTGEN_RUN_DIR.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.job.errors import JobError
from runtime.job.progress import say
from runtime.node.check import BAD, NO_GPU, RESULT, name

Plan = dict[str, Any]
LIMIT_S = 60.0  # after the imports of the training, which take as long as those of the check
LONGEST_LINE = 900  # bytes: srun may tear longer lines apart
SHOWN = ("node", "state", "gpu", "gpus", "gemm_tflops", "copy_gb_per_s", "host_gb_per_s", "all_reduce_gb_per_s", "seconds")


@contextmanager
def checked(plan: Plan) -> Iterator[None]:
    """Check the node while the block runs, and tell what was found when it ends. JobError: the plan says stop."""
    if not plan["node_check"]["on"] or os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    process = _start(plan)
    try:
        yield
        found = _found(process)
    finally:
        process.kill()
        process.wait()
    _tell(found)
    if found["state"] == BAD and plan["node_check"]["bad"] == "stop":
        hint = 'exclude the node (sbatch --exclude), or set bad = "warn" in [node_check] of the site profile'
        raise JobError(f"node {found['node']} is not well: {'; '.join(found['problems'])}", hint)


def _start(plan: Plan) -> "subprocess.Popen[str]":
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime.node.check"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # CUDA counts GPUs as nvidia-smi does
        env=os.environ | {"PYTHONPATH": path, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
    )
    assert process.stdin  # noqa: S101 - it is a pipe
    asked = {key: plan[key] for key in ("gpu", "gpus_per_node", "node_check")}
    process.stdin.write(json.dumps(asked))
    process.stdin.close()
    process.stdin = None  # communicate() would flush it
    return process


def _found(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """What the process found; that it found nothing is a problem of the node too."""
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return _nothing(f"the check did not end within {LIMIT_S:.0f} s: a GPU may hang")
    for line in out.splitlines():
        if line.startswith(RESULT):
            found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
            return found
    last = next((line for line in reversed(err.splitlines()) if line.strip()), f"exit code {process.returncode}")
    return _nothing(f"the check failed: {last.strip()}")


def _nothing(why: str) -> dict[str, Any]:
    return {"node": name(), "state": BAD, "problems": [why]}


def _tell(found: dict[str, Any]) -> None:
    """Write all into the file, and what fits into a line of the log."""
    folder = Path(os.environ.get("FTGEN_RUN_DIR") or ".", "nodes")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        Path(folder, f"{found['node']}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"ftgen: warning: {folder} cannot be written: {error.strerror}", file=sys.stderr, flush=True)
    shown = {key: found[key] for key in SHOWN if key in found}
    print(f"ftgen node: {json.dumps(shown | {'problems': _fitting(found['problems'], shown)})}", flush=True)
    for problem in found["problems"]:
        say(f"warning: node {found['node']} is not well: {problem}", any_rank=True)
    if found["state"] == NO_GPU:
        say(f"node {found['node']}: no GPU to check")


def _fitting(problems: list[str], shown: dict[str, Any]) -> list[str]:
    """As many problems as fit into the line, and the number of the rest."""
    kept: list[str] = []
    for number, problem in enumerate(problems):
        line = json.dumps(shown | {"problems": [*kept, problem]})
        if len(line) > LONGEST_LINE:
            return [*kept, f"and {len(problems) - number} more"]
        kept.append(problem)
    return kept
