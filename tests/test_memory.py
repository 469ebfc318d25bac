"""The estimate of a GPU's memory against the peaks that real runs measured."""

import json
import re
from pathlib import Path

import pytest

from ftgen import memory
from ftgen.experiment import load

RUNS = sorted(
    log for case in ("h100", "h200", "h200_pair") for log in (Path(__file__).parent / "logs" / case).rglob("log-*.out")
)
BENCH = Path(__file__).parent.parent / "bench/specs"


@pytest.mark.parametrize("log", RUNS, ids=lambda log: log.parent.parent.name)
def test_the_estimate_is_near_the_measured_peak(log):
    text = log.read_text(errors="replace")
    measured = max(int(number) for number in re.findall(r"max_memory_allocated: (\d+)", text)) / 2**30
    plan = json.loads((log.parent / "plan.json").read_text())
    changes = [f"optimizations.{name}={str(on).lower()}" for name, on in plan["optimizations"].items()]
    changes += ["optimizations.preset=stock", f"gpus={plan['gpus']}"]
    estimated = memory.estimate(load(BENCH / f"{plan['name']}.toml", overrides=changes).plan)
    assert estimated.total == pytest.approx(measured, rel=0.035)


def test_four_gpus_hold_what_one_does_not():
    four = memory.estimate(load(BENCH / "sft_bf16.toml").plan)
    assert 70 < four.total < 80  # 74 GiB were seen on each of four H200s
    with pytest.raises(Exception, match="must hold the run"):
        load(BENCH / "sft_bf16.toml", overrides=["gpus=1"])


def test_a_cpu_needs_no_gpu_memory():
    assert memory.estimate(load(Path(__file__).parent.parent / "specs/quickstart.toml").plan) is None
