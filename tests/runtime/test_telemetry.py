"""The telemetry of a node: what NVML says of its GPUs comes into a file, and nothing that happens to it stops a training.

NVML is a library of our own that answers its calls (nvml.c): the machine of the tests has no GPU.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from runtime.node import telemetry

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLAN = {"gpu": {"name": "h100"}, "gpus_per_node": 2, "telemetry": True}
TRAINING = """
import json, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from runtime.node import telemetry
telemetry.begin(json.loads(sys.argv[1]))
time.sleep(float(sys.argv[3]))
for step in range(int(sys.argv[2])):
    telemetry.before_step(step)
    time.sleep(0.4)
    telemetry.after_step(step)
print("trained", flush=True)
time.sleep(float(sys.argv[4]))
"""


@pytest.fixture(scope="session")
def nvml(tmp_path_factory):
    """A folder with our NVML."""
    gcc = shutil.which("gcc") or shutil.which("cc")
    if not gcc:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    command = [gcc, "-shared", "-fPIC", "-Wall", "-Werror", "-o", folder / "libnvidia-ml.so.1", HERE / "nvml.c"]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def begin(tmp_path, nvml):
    """Start a process that trains so many steps, and end whatever is left of it."""
    started = []

    def start(steps=3, plan=PLAN, before=0.0, after=0.0, **environment):
        variables = {"LD_LIBRARY_PATH": str(nvml), "FTGEN_RUN_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), **environment}
        without = {"CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "RANK", "SLURMD_NODENAME"} | {
            name for name, value in variables.items() if value is None
        }
        env = {name: value for name, value in (os.environ | variables).items() if name not in without or value}
        command = [sys.executable, "-c", TRAINING, json.dumps(plan), *map(str, (steps, before, after))]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env | {"SLURMD_NODENAME": "node1"}
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def lines_of(folder):
    """The head, the samples and the steps of the telemetry in a folder."""
    (file,) = folder.glob("telemetry.*")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return lines[0], [line for line in lines if "power_w" in line], [line for line in lines if "step" in line]


def samplers_of(pid):
    """The sampler of a process, by its arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"runtime.node.sampler" in words and words[-2] == str(pid).encode():
            found.append(int(path.parent.name))
    return found


def wait_until(condition, limit_s=15.0):
    """Wait for a condition; whether it came."""
    until = time.monotonic() + limit_s
    while not (value := condition()) and time.monotonic() < until:
        time.sleep(0.05)
    return value


def test_power_clocks_and_the_ends_of_steps_come_into_the_file(begin, tmp_path):
    out, _ = begin(steps=6, before=1.0).communicate(timeout=60)
    assert out == "trained\n"
    head, samples, steps = lines_of(tmp_path)
    assert (head["format"], head["node"]) == (1, "node1")
    assert head["gpus"][1] == {"index": "1", "uuid": "GPU-00000001", "name": "NVIDIA H100 80GB HBM3"}
    assert [line["step"] for line in steps] == [-1, 0, 1, 2, 3, 4, 5]
    took = steps[-1]["time_s"] - steps[0]["time_s"]
    assert 2.4 <= took < 10  # six steps of 0.4 s, on a busy machine
    expected = {
        "power_w": [500, 600],
        "sm_clock_mhz": [1755, 1755],
        "memory_clock_mhz": [2619, 2619],
        "throttle_reasons": [4, 4],
        "temperature_c": [58, 59],
        "memory_used_gib": [29, 29],
    }
    assert {name: samples[1][name] for name in expected} == expected
    first, last = samples[0], samples[-1]
    joules = [after - before for before, after in zip(first["energy_j"], last["energy_j"], strict=True)]
    assert joules == pytest.approx(
        [500 * (last["time_s"] - first["time_s"]), 600 * (last["time_s"] - first["time_s"])], rel=0.02
    )


def test_there_is_one_sample_a_second(begin, tmp_path):
    begin(steps=0, before=4.5).communicate(timeout=60)
    times = [sample["time_s"] for sample in lines_of(tmp_path)[1]]
    apart = [after - before for before, after in pairwise(times)]
    assert 2 <= len(apart) <= 4
    assert min(apart) > 0.8
    assert median(apart) < 1.3  # a busy machine may miss one


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_sampler_ends_with_the_training_whatever_ends_it(begin, tmp_path, end):
    training = begin(steps=0, before=60)
    assert wait_until(lambda: list(tmp_path.glob("telemetry.*")))
    (sampler,) = samplers_of(training.pid)
    training.send_signal(end)
    training.wait(timeout=10)
    assert wait_until(lambda: not Path(f"/proc/{sampler}").exists())


def test_signals_that_slurm_sends_to_every_process_do_not_end_the_sampler(begin, tmp_path):
    training = begin(steps=2, before=2.5)
    assert wait_until(lambda: list(tmp_path.glob("telemetry.*")))
    (sampler,) = samplers_of(training.pid)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(sampler, number)
    assert training.communicate(timeout=30)[0] == "trained\n"
    assert [line["step"] for line in lines_of(tmp_path)[2]] == [-1, 0, 1]


def test_without_nvml_the_log_says_once_why_there_is_no_telemetry(begin, tmp_path):
    out, _ = begin(LD_LIBRARY_PATH=None).communicate(timeout=60)
    assert "trained\n" in out
    (said,) = [line for line in out.splitlines() if line != "trained"]
    assert said.startswith("ftgen: no telemetry of node node1: NVML cannot be loaded: libnvidia-ml.so.1")
    assert not list(tmp_path.glob("telemetry.*"))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"NVML_FAILS": "nvmlInit_v2"}, "nvmlInit_v2: Driver Not Loaded (9)"),
        ({"NVML_GPUS": "0"}, "NVML finds no GPU"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1234"}, "a part of a GPU (MIG) has no power of its own"),
    ],
)
def test_a_node_without_telemetry_says_why_and_trains(begin, environment, said):
    out, _ = begin(**environment).communicate(timeout=60)
    assert f"ftgen: no telemetry of node node1: {said}\n" in out
    assert "trained\n" in out


@pytest.mark.parametrize(
    ("plan", "rank", "said"),
    [
        ({**PLAN, "telemetry": False}, "0", ""),
        (PLAN, "1", ""),
        ({**PLAN, "gpu": {"name": "cpu"}}, "0", "the run has no GPU"),
    ],
)
def test_only_the_first_rank_of_a_node_samples_and_only_if_the_plan_asks(begin, tmp_path, plan, rank, said):
    out, _ = begin(plan=plan, LOCAL_RANK=rank).communicate(timeout=60)
    assert out == (f"ftgen: no telemetry: {said}\n" if said else "") + "trained\n"
    assert not list(tmp_path.glob("telemetry.*"))


def test_the_gpus_of_the_training_are_sampled_and_no_others(begin, tmp_path):
    begin(NVML_GPUS="8", CUDA_VISIBLE_DEVICES="5,6", before=1.0).communicate(timeout=60)
    head, samples, _ = lines_of(tmp_path)
    assert [gpu["index"] for gpu in head["gpus"]] == ["5", "6"]
    assert samples[0]["power_w"] == [1000, 1100]


def test_a_figure_that_a_gpu_does_not_have_is_missing(begin, tmp_path):
    begin(NVML_FAILS="nvmlDeviceGetTotalEnergyConsumption", before=1.0).communicate(timeout=60)
    _, samples, _ = lines_of(tmp_path)
    assert (samples[0]["energy_j"], samples[0]["power_w"]) == ([None, None], [500, 600])


def test_a_full_disk_ends_the_telemetry_and_not_the_training(begin, tmp_path):
    (tmp_path / "telemetry.node1.jsonl").symlink_to("/dev/full")
    out, _ = begin(steps=3, before=1.5).communicate(timeout=60)
    assert "trained\n" in out
    assert "ftgen: warning: no telemetry of node node1 from here on: its sampler ended: No space left on device\n" in out


def test_a_sampler_that_hangs_never_makes_the_training_wait(begin, tmp_path):
    training = begin(steps=3, before=1.5)
    assert wait_until(lambda: list(tmp_path.glob("telemetry.*")))
    (sampler,) = samplers_of(training.pid)
    os.kill(sampler, signal.SIGSTOP)
    try:
        assert training.communicate(timeout=20)[0] == "trained\n"
    finally:
        os.kill(sampler, signal.SIGCONT)
    assert wait_until(lambda: not Path(f"/proc/{sampler}").exists())


def test_attempts_of_a_run_append_to_one_file(begin, tmp_path):
    for _ in range(2):
        begin(steps=1, before=1.0).communicate(timeout=60)
    (file,) = tmp_path.glob("telemetry.*")
    assert file.read_text().count('"format":1') == 2


def test_a_sample_of_eight_gpus_takes_less_than_a_thousandth_of_a_core(nvml, tmp_path):
    """Without the time in the driver, which only a GPU's machine can tell."""
    program = (
        "import json, resource, time\n"
        "from runtime.node import sampler\n"
        "from runtime.node.nvml import Nvml\n"
        "nvml = Nvml()\n"
        "gpus = [gpu for gpu, _ in sampler.chosen(nvml, 8)]\n"
        "begin = time.process_time()\n"
        "for _ in range(200): json.dumps(sampler.sample(nvml, gpus))\n"
        "print((time.process_time() - begin) / 200)\n"
    )
    env = {"LD_LIBRARY_PATH": str(nvml), "PYTHONPATH": str(ROOT), "NVML_GPUS": "8"}
    done = subprocess.run([sys.executable, "-S", "-c", program], env=env, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-3


@pytest.fixture
def running(nvml, tmp_path, monkeypatch):
    """The sampler of this process."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(nvml))
    monkeypatch.setenv("FTGEN_RUN_DIR", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    telemetry.begin(PLAN)
    (running,) = telemetry._running
    yield running
    telemetry._running.clear()
    running.process.kill()
    running.process.wait(timeout=10)


def test_the_end_of_a_step_takes_microseconds_to_tell(running, tmp_path):
    begin = time.perf_counter()
    for step in range(200):
        telemetry.after_step(step)
    took = (time.perf_counter() - begin) / 200
    assert took < 5e-4
    assert telemetry.is_on()
    assert wait_until(lambda: list(tmp_path.glob("telemetry.*")) and len(lines_of(tmp_path)[2]) == 200)


def test_a_sampler_that_does_not_keep_up_is_left_behind(running, capfd):
    os.kill(running.process.pid, signal.SIGSTOP)
    begin = time.perf_counter()
    for step in range(10_000):
        telemetry.after_step(step)
    assert time.perf_counter() - begin < 5
    assert not telemetry.is_on()
    os.kill(running.process.pid, signal.SIGCONT)
    assert running.process.wait(timeout=10) == 0
    assert capfd.readouterr().out.count("its sampler does not keep up with the steps, and was told to end") == 1


@pytest.mark.runtime
def test_lightning_tells_the_end_of_each_step(running, tmp_path):
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    from runtime.engines.nemo.step_ends import TellSteps

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_steps=3, accelerator="cpu", limit_val_batches=0, callbacks=[TellSteps()], **quiet).fit(BoringModel())
    assert wait_until(
        lambda: list(tmp_path.glob("telemetry.*")) and [line["step"] for line in lines_of(tmp_path)[2]] == [-1, 0, 1, 2]
    )
