"""The benchmarks in small: each is run as its first lines say, on the CPU."""

import gzip
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TURN = re.compile(r"bench: turn (?:begins|ends) ([\d.]+)")


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
def test_trainings_start_at_once_and_take_turns(tmp_path):
    specs = [tmp_path / "first.toml", tmp_path / "second.toml"]
    for number, spec in enumerate(specs, 1):
        spec.write_text(f'extends = "{ROOT / "specs" / "quickstart.toml"}"\nseed = {number}\n')
    options = ["--gpu", "cpu", "--steps", "25", "--stage", tmp_path / "stage", "--out", tmp_path / "out"]
    bench("train.py", *specs, "--variants", "ftgen", "--at-once", "2", *options)
    (result,) = (tmp_path / "out").glob("*-cpu.json")
    runs = json.loads(result.read_text())["runs"]
    assert [(run["spec"], run["status"], run["steps"]) for run in runs] == [
        ("first", "complete", 25),
        ("second", "complete", 25),
    ]
    assert runs[0]["losses"] != runs[1]["losses"]
    logs = [(tmp_path / "stage" / run["log"]).read_text() for run in runs]
    turns = [[float(time_s) for time_s in TURN.findall(log)] for log in logs]
    assert [len(turn) for turn in turns] == [2, 2]
    assert turns[0][0] < turns[0][1] < turns[1][0] < turns[1][1]
    for log in logs:  # each step is within the turn
        assert (
            log.index("bench: turn begins")
            < log.index("iteration 0/")
            < log.index("iteration 24/")
            < log.index("bench: turn ends")
        )
    waits = tmp_path / "stage" / "scripts" / "ftgen"
    loaded = [(waits / f"{spec.stem}.0.turn" / "loaded").stat().st_mtime for spec in specs]
    assert max(loaded) < turns[0][0]


# In the place of a job's script: it loads, waits for its turn and trains.
SCRIPT = """
{load}
touch "$TURN/loaded"
until [[ -e $TURN/go ]]; do sleep 0.05; done
echo "{name} begins" >>"$LOGS/$CUDA_VISIBLE_DEVICES"
ls "$LOGS" >"$LOGS/seen.{name}"
{train}
echo "{name} ends" >>"$LOGS/$CUDA_VISIBLE_DEVICES"
touch "$TURN/done"
"""
SCRIPTS = {  # GPU, what it does before its turn, and in its turn
    "good": ("0", "", "sleep 0.5"),
    "no_load": ("0", "exit 1", ""),
    "no_end": ("0", "", "exec sleep 100"),
    "other": ("1", "", "sleep 0.5"),
    "fails": ("0", "", "exit 1"),
    "no_load_end": ("0", "exec sleep 100", ""),
    "last": ("0", 'sleep 1; touch "$LOGS/loaded_last"', "sleep 0.1"),
}


def test_jobs_that_fail_or_hang_do_not_keep_the_others_from_their_turns(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    at_once = importlib.import_module("at_once")
    jobs = []
    for name, (gpu, load, train) in SCRIPTS.items():
        (tmp_path / f"{name}.sh").write_text(SCRIPT.format(name=name, load=load, train=train))
        jobs.append(at_once.Job(tmp_path / f"{name}.sh", gpu=gpu))
    (tmp_path / "logs").mkdir()
    ended = list(at_once.run(jobs, os.environ | {"LOGS": str(tmp_path / "logs")}, limit_s=2.5))
    assert sorted(job.script.stem for job in ended) == sorted(SCRIPTS)
    assert {job.script.stem for job in ended if job.process.returncode == 0} == {"good", "other", "last"}
    assert (tmp_path / "logs" / "0").read_text().splitlines() == [
        "good begins",
        "good ends",
        "no_end begins",
        "fails begins",
        "last begins",
        "last ends",
    ]
    assert (tmp_path / "logs" / "1").read_text().splitlines() == ["other begins", "other ends"]
    for name in ("good", "other"):  # they were the first, and waited for the slowest
        assert "loaded_last" in (tmp_path / "logs" / f"seen.{name}").read_text().split()


def test_jobs_start_at_once_in_batches_of_each_gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    at_once = importlib.import_module("at_once")
    jobs = [at_once.Job(Path(f"{number}.sh"), gpu=gpu) for number, gpu in enumerate("00011")]
    batches = [[job.script.stem for job in batch] for batch in at_once.batches(jobs, 2)]
    assert batches == [["0", "1", "3", "4"], ["2"]]


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


def test_the_optimizers_part_and_hidden_communication_are_told_apart(tmp_path):
    def kernel(name, begin, end, cat="kernel"):
        return {"ph": "X", "cat": cat, "name": name, "ts": begin * 1e3, "dur": (end - begin) * 1e3}

    # A step, in milliseconds: a product, a reduction that ends 10 later, the optimizer, a gather, the next products.
    one = [
        ("nvjet_sm90", 0, 100),
        ("ncclDevKernel_ReduceScatter", 80, 110),
        ("copy_of_a_gradient", 110, 114),
        ("FillFunctor", 114, 120),
        ("multi_tensor_l2norm", 120, 122),
        ("multi_tensor_adam", 122, 150),
        ("cast_transpose", 150, 156),
        ("spin_kernel", 156, 160),
        ("ncclDevKernel_AllGather", 156, 166),
        ("copy_of_an_embedding", 166, 170),
        ("nvjet_sm90", 170, 180),
        ("copy_in_the_middle", 180, 190),
        ("nvjet_sm90", 190, 200),
    ]
    events = [kernel(name, begin + 200 * step, end + 200 * step) for step in range(4) for name, begin, end in one]
    events.append(kernel("cudaLaunchKernel", 0, 800, cat="cuda_runtime"))
    (tmp_path / "out.json").write_text(json.dumps({"wall_without_profiler_s": 0.2}))
    with gzip.open(tmp_path / "out.trace.json.gz", "wt") as text:
        json.dump({"traceEvents": events}, text)
    rows = [line.split() for line in bench("optimizer_part.py", tmp_path / "out.json").splitlines()]
    # optimizer: 4 + 2 + 28 + 6 + 4; exposed: 10 + 10
    assert [float(row[-1]) for row in rows] == [200.0, 44.0, 20.0, 178.0, 188.0]


def events_of_a_step(begin):
    """A kernel forward, one backward, and 150 µs later the optimizer, before whose launch the host waits for 500 µs."""
    launched = [("spin_kernel", 0, 1), ("fwd", 10, 400), ("bwd", 450, 200), ("spin_kernel", 660, 1), ("adam", 800, 50)]
    for number, (name, at, took) in enumerate(launched):
        mark = {"args": {"correlation": begin + number}}
        yield {"cat": "kernel", "name": name, "ts": begin + at, "dur": took} | mark
        host = {"name": "cudaLaunchKernel", "ts": begin + (750 if name == "adam" else 0), "dur": 3, "tid": 1}
        yield {"cat": "cuda_runtime"} | host | mark
    for name, at, took, category in (
        ("step", 100, 700, "python_function"),
        ("norm", 110, 600, "python_function"),
        ("cudaStreamSynchronize", 120, 500, "cuda_runtime"),
    ):
        yield {"cat": category, "name": name, "ts": begin + at, "dur": took, "tid": 1, "args": {}}


def test_times_without_a_kernel_are_told_apart(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    figures = runpy.run_path(str(ROOT / "bench" / "kernels.py"))["figures"]
    found = figures(0.004, 0.008, [event for step in range(4) for event in events_of_a_step(1000 * step)])
    gaps = found["gaps"]
    assert found["busy_s"] == pytest.approx(650e-6)
    assert [row["kernel"] for row in found["kernels"]] == ["fwd", "bwd", "adam"]
    assert gaps["between_steps_s"] == pytest.approx(310e-6)
    assert gaps["between_steps_with_kernels_s"] == pytest.approx(360e-6)
    assert gaps["elsewhere_s"] == pytest.approx((4 * 40 + 150) / 4 * 1e-6)
    assert gaps["host_ahead_at_end_of_backward_s"] == pytest.approx([660e-6] * 4)
    assert [row["kernels"] for row in gaps["longest_between"]] == ["adam -> fwd", "bwd -> adam"]
    assert found["waits"][0]["call"] == "cudaStreamSynchronize"
    assert found["waits"][0]["callers"] == ("norm", "step")
    assert [row["name"] for row in found["host"]["functions"][:2]] == ["step", "norm"]
