"""The benchmarks in small: each is run as its first lines say, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def bench(name, *arguments):
    command = [sys.executable, ROOT / "bench" / name, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_readers_agree_and_are_timed(tmp_path):
    table = bench("reading.py", "--scale", "0.0005", "--rounds", "1", "--output", tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(results) == len(table.splitlines()) - 2 == 3
    assert all(result["ftgen"]["seconds"] > 0 and result["lines"]["count"] > 0 for result in results.values())


@pytest.mark.runtime
def test_two_trainings_side_by_side(tmp_path):
    options = ["--gpu", "cpu", "--steps", "25", "--stage", tmp_path / "stage", "--out", tmp_path / "out"]
    bench("train.py", ROOT / "specs" / "quickstart.toml", *options)
    (result,) = (tmp_path / "out").glob("*-cpu.json")
    runs = json.loads(result.read_text())["runs"]
    assert [(run["variant"], run["status"], run["steps"]) for run in runs] == [
        ("stock", "complete", 25),
        ("ftgen", "complete", 25),
    ]
    assert runs[0]["losses"] == runs[1]["losses"]  # on a CPU both are the stock recipe
    assert all(run["step_time_s"] > 0 and run["versions"]["torch"] for run in runs)


@pytest.mark.runtime
def test_a_nudge_is_seen_and_a_second_run_is_not(tmp_path):
    options = ["--gpu", "cpu", "--steps", "4", "--stage", tmp_path / "stage"]
    table = bench("compare.py", ROOT / "specs" / "quickstart.toml", *options)
    rows = {line[:32].strip(): [float(cell) for cell in line[32:].split()] for line in table.splitlines()[1:]}
    assert rows["stock again"] == rows["all"] == [0.0, 0.0, 0.0]
    assert min(rows["stock, one weight nudged"]) > 0


def test_a_spec_that_is_refused_ends_with_the_words_of_ftgen(tmp_path):
    spec = tmp_path / "wrong.toml"
    spec.write_text('scheme = "lorra"\nprecision = "bf16"\ngpus = 1\ngpu = "h200"\n')
    for name in ("train.py", "peers/run.py"):
        command = [sys.executable, ROOT / "bench" / name, spec, "--gpu", "h200", "--stage", tmp_path / "stage"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(f"{spec}:1: scheme: must be 'sft' or 'lora', found \"lorra\"\n")
        assert "Traceback" not in done.stderr
