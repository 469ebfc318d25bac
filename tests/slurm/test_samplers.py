"""One sampler runs on each node of a job, and ends with it. NVML is our own library: the cluster's GPUs are none."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cluster import ROOT, SITE, Desk, until

TWO_BY_TWO = SITE + 'convert = "task"\ngpus_per_node = 2\n[node_check]\non = false\n'


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """What a job needs to find our NVML."""
    gcc = shutil.which("gcc")
    assert gcc
    command = [gcc, "-shared", "-fPIC", "-o", tmp_path / "libnvidia-ml.so.1", ROOT / "tests" / "runtime" / "nvml.c"]
    subprocess.run(command, check=True)
    return {"LD_LIBRARY_PATH": str(tmp_path), "NVML_GPUS": "8", "PROGRAM_MODE": "sampled"}


def samplers(desk: Desk) -> list[int]:
    """Processes that sample for this desk's jobs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"runtime.node.sampler" in words and any(str(desk.stage).encode() in word for word in words):
            found.append(int(path.parent.name))
    return found


def files(desk: Desk) -> list[Path]:
    return sorted(desk.stage.glob("logs/experiments/*/*/*/telemetry.*.jsonl"))


def test_each_node_is_sampled_once(desk, variables):
    job = desk.submit(desk.compile("spec", gpus=4, gpu="h100", site=TWO_BY_TWO), PROGRAM_TRAIN_S="3", **variables)
    assert desk.ended(job, 120).state == "COMPLETED", desk.everything()
    assert [path.name for path in files(desk)] == ["telemetry.node1.jsonl", "telemetry.node2.jsonl"]
    for path in files(desk):
        head, *samples = [json.loads(line) for line in path.read_text().splitlines()]
        assert path.name == f"telemetry.{head['node']}.jsonl"
        assert [gpu["index"] for gpu in head["gpus"]] == ["0", "1"]
        assert len(samples) >= 3
        assert all(sample["power_w"] == [500, 600] for sample in samples)
    until(lambda: not samplers(desk), 10)
    assert "no telemetry" not in desk.log(job)


@pytest.mark.parametrize("how", [["scancel"], ["scancel", "--signal=KILL", "--full"]], ids=" ".join)
def test_a_cancelled_job_leaves_no_sampler(desk, variables, how):
    job = desk.submit(desk.compile("spec", gpus=4, gpu="h100", site=TWO_BY_TWO), PROGRAM_TRAIN_S="300", **variables)
    until(lambda: len(files(desk)) == 2, 90, desk.everything)
    assert len(samplers(desk)) == 2
    desk.cluster.call(*how, job)
    desk.ended(job, 90)
    until(lambda: not samplers(desk), 20)
