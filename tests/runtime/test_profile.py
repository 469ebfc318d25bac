"""Profiling: real torch.profiler in a real Lightning training; the command line that Nsight Systems gets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TRAIN = """
import sys
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from runtime.engines.nemo.profiling import ProfileSteps
callback = ProfileSteps("pytorch", 2, 3, sys.argv[1])
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0)
Trainer(max_steps=6, accelerator="cpu", callbacks=[callback], **quiet).fit(BoringModel())
"""
ENTER = """
import json, sys
from runtime.job import profile
from runtime.job.errors import JobError
try:
    profile.enter(json.loads(sys.argv[1]))
except JobError as error:
    sys.exit(str(error))
print("trains, inside nsys:", profile.INSIDE in __import__("os").environ)
"""
PLAN = {"profile": {"tool": "nsys", "first_step": 5, "last_step": 6, "ranks": [1]}}


@pytest.mark.runtime
def test_pytorchs_profiler_records_the_steps_that_are_asked_for(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, tmp_path / "profile/rank_0"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    trace = json.loads((tmp_path / "profile/rank_0.json").read_text())
    backward = [
        event for event in trace["traceEvents"] if event.get("name") == "autograd::engine::evaluate_function: AddmmBackward0"
    ]
    assert len(backward) == 2  # of the model's one layer, in two steps


def enter(folder: Path, rank: int, path: str) -> subprocess.CompletedProcess[str]:
    (folder / "enter.py").write_text(ENTER)
    environment = {"PATH": path, "RANK": str(rank), "FTGEN_RUN_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, folder / "enter.py", json.dumps(PLAN)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_nsys_takes_the_place_of_the_ranks_that_are_asked_for(tmp_path):
    nsys = tmp_path / "bin/nsys"
    nsys.parent.mkdir()
    nsys.write_text('#!/bin/bash\necho "$@"\nwhile [[ $1 != */python* ]]; do shift; done\nexec "$@"\n')
    nsys.chmod(0o755)
    path = f"{nsys.parent}:{os.environ['PATH']}"
    assert enter(tmp_path, 0, path).stdout == "trains, inside nsys: False\n"
    shown = enter(tmp_path, 1, path).stdout
    assert "--capture-range=cudaProfilerApi" in shown
    assert f"--output={tmp_path}/profile/steps_5-6_rank_1 " in shown
    assert shown.endswith("trains, inside nsys: True\n")


def test_a_node_without_nsys_says_so(tmp_path):
    done = enter(tmp_path, 1, "/nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith("nsys is not installed on this node\n  hint: install Nsight Systems")
