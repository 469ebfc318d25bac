"""From a real training to joules a token: the engines tell the ends of their steps, and the results follow from that."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from stages import Stage, plan

from ftgen.logs.find import find_runs
from ftgen.results.summary import Summary, summarize

pytestmark = pytest.mark.runtime
HERE = Path(__file__).parent
BRIDGE = HERE.parents[1] / ".venv-bridge" / "bin" / "python"
WATTS = 500  # of GPU 0 in nvml.c


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("nvml")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", HERE / "nvml.c"], check=True)
    return str(folder)


def train(stage: Stage, document: dict[str, Any], nvml: str, attempt: int = 0) -> str:
    """One attempt, with its log where a job has it."""
    sampled = Stage(stage.path, stage.python, HERE / "sampled.py")
    status, output = sampled.run(document, "finetune", LD_LIBRARY_PATH=nvml, OMP_NUM_THREADS="1")
    assert status == 0, output[-3000:]
    text = json.dumps(document)
    (stage.path / "run" / "plan.json").write_text(text)
    log = stage.path / "run" / f"log-local.{document['experiment']}_1_{attempt}.out"
    log.write_text(f"ftgen plan: {text}\n{output}ftgen: exit status 0\n")
    return output


def summary(stage: Stage, **options: Any) -> Summary:
    (run,) = find_runs([stage.path / "run"])
    return summarize(run, **options)


@pytest.mark.parametrize("engine", ["nemo", "megatron_bridge"])
def test_a_training_has_the_energy_of_its_window(engine: str, make_stage: Any, nvml: str) -> None:
    stage = make_stage() if engine == "nemo" else Stage(make_stage().path, BRIDGE)
    document = plan(max_steps=8, seq_length=256, engine=engine, window={"last_steps": 4})
    assert stage.run(document, "convert")[0] == 0
    output = train(stage, document, nvml)
    assert "ftgen: no telemetry: the run has no GPU" in output
    found = summary(stage)
    assert (found.status, found.steps) == ("complete", 8)
    assert found.gpu_power_w == pytest.approx(WATTS, rel=0.02)
    assert found.joules_per_token is not None
    assert found.step_time_s is not None
    least = WATTS * found.step_time_s / (4 * 256)  # with what happens between the steps, more
    assert 0.95 * least < found.joules_per_token < 3 * least
    assert found.max_temperature_c is None or found.max_temperature_c == 58
    assert found.energy_kwh is not None


def test_a_resumed_run_has_the_energy_of_both_attempts(make_stage: Any, nvml: str) -> None:
    stage = make_stage()
    document = plan(max_steps=8, save={"every_steps": 4}, window={"last_steps": 6})
    assert stage.run(document, "convert")[0] == 0
    train(stage, document, nvml)
    first = summary(stage)
    shutil.rmtree(stage.path / "run" / "checkpoints" / "step_8")
    again = train(stage, document, nvml, attempt=1)
    assert "ftgen: resumed after step 4: " in again
    (file,) = (stage.path / "run").glob("telemetry.*")
    lines = [json.loads(line) for line in file.read_text().splitlines() if line]
    assert [line["step"] for line in lines if "step" in line] == [*range(-1, 8), *range(3, 8)]
    both = summary(stage)
    assert first.energy_kwh is not None
    assert both.energy_kwh is not None
    assert both.energy_kwh > first.energy_kwh
    assert both.gpu_power_w == pytest.approx(WATTS, rel=0.02)
