"""The generated script on a machine without Slurm: how it starts, what it says, how it ends."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOKEN = "hf_MarkerThatMustNeverBeSeen"
SPEC = 'scheme = "sft"\nprecision = "fp32"\ngpus = 1\ngpu = "cpu"\nmodel = "tiny_llama"\ndata = { kind = "synthetic" }\n'


@pytest.fixture
def script(ftgen, tmp_path):
    """Compiles a spec, and copies the script alone into an empty directory."""

    def make(text: str = SPEC, *arguments: str, name: str = "spec") -> Path:
        (tmp_path / f"{name}.toml").write_text(text)
        done = ftgen("compile", tmp_path / f"{name}.toml", "--out", tmp_path / "out", *arguments)
        assert done.returncode == 0, done.stderr
        alone = tmp_path / "alone"
        alone.mkdir(exist_ok=True)
        return Path(shutil.copy(tmp_path / "out" / f"{name}.sh", alone))

    return make


def run(script: Path, *arguments: object, seconds: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    base = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(script.parent),
        "HF_TOKEN": TOKEN,
    }
    return subprocess.run(
        ["bash", script, *map(str, arguments)],
        cwd=script.parent,
        env=base | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )


def stand_in(folder: Path, body: str) -> str:
    """An interpreter of ours in place of Python, where only the script's side is the point."""
    path = folder / "stand_in"
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


def the_log(folder: Path) -> Path:
    (log,) = folder.glob("logs/experiments/*/*/*/log-*.out")
    return log


def test_a_missing_stage_path_ends_the_job_at_once(script):
    done = run(script(), STAGE_PATH="/no/such/folder", seconds=10)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "ftgen: error: STAGE_PATH is not a folder: /no/such/folder\n  hint: create it with mkdir -p"
    )


def test_a_missing_python_ends_the_job_at_once(script):
    done = run(script(), FTGEN_PYTHON="/no/such/python", seconds=10)
    assert done.returncode == 1
    assert "ftgen: error: there is no Python: /no/such/python\n  hint: activate the environment" in done.stdout


def test_missing_packages_end_the_job_at_once(script, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    done = run(script(), FTGEN_PYTHON=str(tmp_path / "bare/bin/python"), seconds=20)
    assert done.returncode == 1
    assert "nemo" in done.stdout
    assert "megatron" in done.stdout
    assert "hint:" in done.stdout


def test_several_nodes_need_slurm(script):
    done = run(script('scheme = "lora"\nprecision = "fp8"\ngpus = 16\n'), seconds=10)
    assert done.returncode == 1
    assert "this run needs 2 nodes of 8 GPUs\n  hint: submit it: sbatch spec.sh" in done.stdout


def test_a_gated_model_without_a_token_ends_the_job_at_once(script, tmp_path):
    done = run(script('scheme = "lora"\nprecision = "fp8"\ngpus = 1\n'), HF_TOKEN="", seconds=20)
    assert done.returncode == 1
    assert "HF_TOKEN" in done.stdout


def test_the_log_begins_with_the_plan_and_has_it_beside_it(script, tmp_path):
    alone = script()
    run(alone, FTGEN_PYTHON=stand_in(tmp_path, "true"))
    log = the_log(alone.parent)
    assert re.fullmatch(r"log-local\.sft_nemo_tiny_llama_fp32_1_\d+_0\.out", log.name)
    head, plan = log.read_text().splitlines()[0].split(": ", 1)
    assert head == "ftgen plan"
    assert json.loads(plan) == json.loads((log.parent / "plan.json").read_text())
    assert json.loads(plan)["experiment"] == "sft_nemo_tiny_llama_fp32_1"


@pytest.mark.parametrize(("command", "status"), [("check", 1), ("convert", 7), ("finetune", 42)])
def test_the_exit_status_is_that_of_the_step_that_failed(script, tmp_path, command, status):
    alone = script()
    done = run(alone, FTGEN_PYTHON=stand_in(tmp_path, f'echo "ran $2"; [[ $2 != {command} ]] || exit {status}'))
    assert done.returncode == status
    assert done.stdout.endswith(f"ran {command}\nftgen: exit status {status}\n")
    assert the_log(alone.parent).read_text().endswith(f"ran {command}\nftgen: exit status {status}\n")


def test_each_task_knows_its_rank_and_the_first_failure_ends_all(script, tmp_path):
    alone = script(SPEC.replace("gpus = 1", "gpus = 3"))
    body = """[[ $2 = finetune ]] || exit 0
        echo "$RANK/$LOCAL_RANK of $WORLD_SIZE at $MASTER_ADDR"
        [[ $RANK = 1 ]] && sleep 2 && exit 5
        exec sleep 60"""
    done = run(alone, FTGEN_PYTHON=stand_in(tmp_path, body), seconds=30)
    assert done.returncode == 5
    assert {line for line in done.stdout.splitlines() if " of 3" in line} == {f"{n}/{n} of 3 at 127.0.0.1" for n in range(3)}


def test_scripts_after_the_first_run_after_it(script, tmp_path):
    first, second = script(name="first"), script(name="second")
    body = 'echo "$2 by $(basename "$1")"; [[ $(basename "$1") != first.py || $2 != convert ]] || exit 3'
    done = run(first, second, FTGEN_PYTHON=stand_in(tmp_path, body))
    order = [line for line in done.stdout.splitlines() if " by " in line]
    assert order == ["check by first.py", "convert by first.py"] + [
        f"{c} by second.py" for c in ("check", "convert", "finetune")
    ]
    assert done.returncode == 3


def test_two_runs_of_one_second_have_logs_of_their_own(script, tmp_path):
    alone, python = script(), stand_in(tmp_path, "true")
    jobs = [subprocess.Popen(["bash", alone], cwd=alone.parent, env=os.environ | {"FTGEN_PYTHON": python}) for _ in range(4)]
    assert [job.wait(30) for job in jobs] == [0] * 4
    assert len(list(alone.parent.glob("logs/experiments/*/*/*/log-*.out"))) == 4


def test_the_token_is_in_no_file_and_in_no_output(script, tmp_path):
    alone = script()
    done = run(alone, FTGEN_PYTHON=stand_in(tmp_path, "true"))
    assert TOKEN not in done.stdout + done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
