"""The optimization async_step: the host runs ahead of the GPU. Real NeMo on the CPU, where there is nothing to wait for."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interrupted import AGAIN, STEPS, Kill, Leg, lines, resumable, train
from stages import Stage

pytestmark = pytest.mark.runtime
TIME = re.compile(r" \| train_step_timing in s: ([-\d.e]+)")
WHAT = re.compile(r"^(Training epoch .*|ftgen: saved step \d+|ftgen: validation after step \d+: loss \S+)", re.MULTILINE)


def ahead(**changes: Any) -> dict[str, Any]:
    """A plan with async_step, which no spec may ask of a CPU."""
    document = resumable(**changes)
    document["optimizations"]["async_step"] = True
    return document


@pytest.fixture(scope="session")
def stage(make_stage: Callable[[], Stage]) -> Stage:
    """A stage with a converted checkpoint."""
    stage = make_stage()
    status, output = stage.run(resumable(), "convert")
    assert status == 0, output
    return stage


@pytest.fixture(scope="session")
def stock(stage: Stage) -> Leg:
    return train(stage, resumable(), "stock")


@pytest.fixture(scope="session")
def late(stage: Stage) -> Leg:
    return train(stage, ahead(), "late")


def told(output: str) -> list[str]:
    """Lines of steps without their time, of saves and of validations."""
    return [TIME.sub("", line) for line in WHAT.findall(output)]


def test_it_trains_the_same_to_the_last_bit(stage: Stage, stock: Leg, late: Leg) -> None:
    assert (stock.statuses, late.statuses) == ([0], [0]), late.output
    assert "ftgen: optimizations: async_step" in late.output.splitlines()
    assert lines(stage.path / "late") == lines(stage.path / "stock")  # losses, norms of the gradients, validations
    assert all(line["norm"] for (what, _), line in lines(stage.path / "late").items() if what == "step")
    files = sorted((stage.path / "stock" / "checkpoints" / f"step_{STEPS}" / "weights").glob("*.distcp"))
    assert files
    for file in files:
        assert file.read_bytes() == Path(str(file).replace("/stock/", "/late/")).read_bytes()


def test_it_prints_the_same_lines_in_the_same_order(stock: Leg, late: Leg) -> None:
    assert len([line for line in told(late.output) if line.startswith("Training")]) == STEPS
    assert told(late.output) == told(stock.output)
    assert late.output.index(f"iteration {STEPS - 1}/") < late.output.index("`Trainer.fit` stopped")


def test_the_times_are_those_of_the_steps(late: Leg) -> None:
    times = [float(time) for time in TIME.findall(late.output)]
    assert len(times) == STEPS
    assert sorted(times)[1] > 0.3 * sorted(times)[STEPS // 2]  # none is that of a launch alone


def test_a_run_that_is_asked_to_stop_prints_its_last_line_and_goes_on(stage: Stage, stock: Leg) -> None:
    first = train(stage, ahead(), "stopped", Kill("step", 7, "USR1"))
    second = train(stage, ahead(), "stopped")
    assert (first.statuses, second.statuses) == ([AGAIN], [0]), first.output + second.output
    assert lines(stage.path / "stopped") == lines(stage.path / "stock")
    assert [line.split()[4] for line in told(first.output + second.output) if line.startswith("Training")] == [
        f"{step}/{STEPS - 1}" for step in range(STEPS)
    ]


def test_gradients_are_clipped_as_megatron_core_clips_them() -> None:
    script = [sys.executable, "-W", "ignore", Path(__file__).with_name("clipped.py")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(cases) == 280
    assert [case for case in cases if case["same"] != [True, True]] == []
    assert {case["coefficient"] < 1 for case in cases} == {True, False}
