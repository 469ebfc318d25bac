"""The estimate of a GPU's memory against the peaks that real runs measured."""

import re
from pathlib import Path

import pytest

from ftgen import memory
from ftgen.experiment import load

RUNS = sorted((Path(__file__).parent / "logs/h200/logs").rglob("log-*.out"))
BENCH = Path(__file__).parent.parent / "bench/specs"


@pytest.mark.parametrize("log", RUNS, ids=lambda log: log.parent.parent.name)
def test_the_estimate_is_near_the_measured_peak(log):
    text = log.read_text(errors="replace")
    measured = max(int(number) for number in re.findall(r"max_memory_allocated: (\d+)", text)) / 2**30
    head = text.split("\n", 1)[0]
    preset = "measured" if '"skip_nan_check": true' in head else "stock"
    name = re.search(r'"name": "(\w+)"', head)[1]
    estimated = memory.estimate(load(BENCH / f"{name}.toml", overrides=[f"optimizations.preset={preset}"]).plan)
    assert estimated.total == pytest.approx(measured, rel=0.02)


def test_four_gpus_hold_what_one_does_not():
    four = memory.estimate(load(BENCH / "sft_bf16.toml").plan)
    assert 70 < four.total < 80  # 74 GiB were seen on each of four H200s
    with pytest.raises(Exception, match="must hold the run"):
        load(BENCH / "sft_bf16.toml", overrides=["gpus=1"])


def test_a_cpu_needs_no_gpu_memory():
    assert memory.estimate(load(Path(__file__).parent.parent / "specs/quickstart.toml").plan) is None
