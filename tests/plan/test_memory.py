"""The estimate of a GPU's memory against the peaks that real runs measured."""

import json
import re
from pathlib import Path

import pytest

from ftgen.plan import memory
from ftgen.plan.experiments import load_one

LOGS = Path(__file__).parents[1] / "logs"
CASES = ("h100", "h200", "h200_pair", "h200_parallel", "h200_energy")
RUNS = sorted(log for case in CASES for log in (LOGS / case).rglob("log-*.out"))
BENCH = Path(__file__).parents[2] / "bench/specs"
PEAK = re.compile(r"max_memory_allocated: (\d+)")


def split_of(log):
    """What tells a run's split: the model's name, TP, PP and CP."""
    plan = json.loads((log.parent / "plan.json").read_text())
    sizes = plan["parallelism"]
    return plan["model"]["name"], *(sizes[f"{kind}_parallel_size"] for kind in ("tensor_model", "pipeline_model", "context"))


def estimated_and_measured(log):
    """GiB of one GPU."""
    plan = json.loads((log.parent / "plan.json").read_text())
    changes = [f"optimizations.{name}={str(on).lower()}" for name, on in plan["optimizations"].items()]
    changes += ["optimizations.preset=stock", f"gpus={plan['gpus']}"]
    sizes = {key: size for key, size in plan["parallelism"].items() if key != "data_parallel_size" and size is not None}
    changes += [f"parallelism.{key}={str(size).lower()}" for key, size in sizes.items()]
    estimated = memory.estimate(load_one(BENCH / f"{plan['name']}.toml", overrides=changes).plan)
    return estimated.total, max(int(number) for number in PEAK.findall(log.read_text(errors="replace"))) / 2**30


SPLITS = [("llama3_8b", 1, 1, 1), ("llama3_8b", 2, 1, 1), ("llama3_8b", 1, 2, 1)]  # eight layers keep little
WHOLE = [log for log in RUNS if log.parts[-7] not in {"h200_parallel", "h200_energy"} or split_of(log) in SPLITS]


@pytest.mark.parametrize("log", WHOLE, ids=lambda log: log.parent.parent.name)
def test_the_estimate_is_near_the_measured_peak(log):
    estimated, measured = estimated_and_measured(log)
    assert estimated == pytest.approx(measured, rel=0.035)


def test_four_gpus_hold_what_one_does_not():
    four = memory.estimate(load_one(BENCH / "sft_bf16.toml").plan)
    assert 70 < four.total < 80  # 74 GiB were seen on each of four H200s
    with pytest.raises(Exception, match="must have enough memory"):
        load_one(BENCH / "sft_bf16.toml", overrides=["gpus=1"])


def test_a_cpu_needs_no_gpu_memory():
    assert memory.estimate(load_one(Path(__file__).parents[2] / "specs/quickstart.toml").plan) is None
