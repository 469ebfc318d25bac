"""The main job, end to end, as the README has it: a spec, its script copied alone into an empty folder, the table."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.runtime
ROOT = Path(__file__).parents[2]
TOKEN = "hf_MarkerThatMustNeverBeSeen"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    alone = tmp_path_factory.mktemp("quickstart")
    out = tmp_path_factory.mktemp("compiled")
    subprocess.run([sys.executable, "-m", "ftgen", "compile", "specs/quickstart.toml", "--out", out], cwd=ROOT, check=True)
    script = shutil.copy(out / "quickstart.sh", alone)
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(alone),
        "HF_TOKEN": TOKEN,
    }
    done = subprocess.run(
        ["bash", script], cwd=alone, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    return alone, done


def test_the_quickstart_ends_with_a_step_time_in_its_table(job, ftgen) -> None:
    alone, done = job
    assert done.returncode == 0, done.stdout[-3000:]
    (run,) = json.loads(ftgen("tabulate", alone / "logs", "--format", "json").stdout)["runs"]
    assert (run["status"], run["steps"], run["window"], run["gpu"]) == ("complete", 100, 20, "cpu")
    assert 0 < run["step_time_s"] < 30
    assert run["tokens_per_s"] == pytest.approx(4 * 256 / run["step_time_s"])
    shown = ftgen("tabulate", alone / "logs").stdout
    assert "Training step time (seconds per step)" in shown
    assert run["mfu"] is None  # no peak is claimed for a CPU


def test_the_quickstart_learns(job) -> None:
    losses = [float(line.split("reduced_train_loss: ")[1].split()[0]) for line in step_lines(job)]
    assert len(losses) == 100
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 1


def test_the_fine_tune_is_killed_goes_on_and_ends_with_a_model_that_answers(tmp_path: Path, ftgen) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples/finetune.py"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ftgen: exit status 137" in done.stdout
    assert "ftgen: resumed after step 100: " in done.stdout
    assert done.stdout.endswith("> What do bees make from nectar?\nBees make honey from nectar.\n")
    (run,) = json.loads(ftgen("tabulate", tmp_path / "logs", "--format", "json").stdout)["runs"]
    assert (run["status"], run["steps"], run["saves"], run["validation_step"]) == ("complete", 250, 10, 250)
    assert run["tokens_trained"] == 250 * 4 * 512
    assert len(run["attempts"]) == 2
    assert 0 < run["goodput"] < 1
    assert 0 < run["save_share"] < 1
    assert run["validation_loss"] < 1  # it answers questions in other words than those that it was trained on
    assert any("resumed" in note for note in run["notes"])


def step_lines(job) -> list[str]:
    return [line for line in job[1].stdout.splitlines() if line.startswith("Training epoch 0, iteration ")]


def test_the_quickstart_lays_its_files_out_as_the_recipe(job) -> None:
    alone, _ = job
    (checkpoint,) = (alone / "HF_ckpt/models/random").glob("tiny_llama*")
    assert {path.name for path in checkpoint.iterdir()} == {"context", "weights", "hugging_face", "manifest.json"}
    (log,) = alone.glob("logs/experiments/*/*/*/log-*.out")
    experiment = "sft_nemo_tiny_llama_fp32_1"
    assert log.parts[-5:-1][1] == experiment
    assert log.parent.name == experiment
    assert (log.parent / "plan.json").is_file()


def test_the_token_is_in_none_of_the_quickstarts_files(job) -> None:
    alone, done = job
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path in alone.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
