"""The check of a node: what nvidia-smi says is read and judged, and a bad node is named where a user looks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ftgen import catalogue
from ftgen.logs.find import find_runs
from ftgen.results.summary import summarize
from runtime.job.errors import JobError
from runtime.node import beside, check, judge, smi

HERE = Path(__file__).parent
H100 = {"driver_name": "H100", "peak_bf16_tflops": 989, **catalogue.gpus()["h100"].expected}
H200 = {"driver_name": "H200", "peak_bf16_tflops": 989, **catalogue.gpus()["h200"].expected}


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A node of eight H100s, as nvidia-smi tells of it; the function changes what it tells."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{HERE / "nvidia_smi.py"}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def change(**variables: object) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(f"SMI_{name}", value if isinstance(value, str) else json.dumps(value))

    return change


def plan_for(gpu="cpu", bad="warn", on=True, gpus_per_node=1, expected=None):
    asked = {"on": on, "bad": bad, "expected": expected or {}}
    return {"gpu": {"name": gpu}, "gpus_per_node": gpus_per_node, "node_check": asked}


def asked_and_judged(wanted=8, **figures):
    """What a node's GPUs are found to be, with the figures of a healthy H100 unless given otherwise, by GPU."""
    gpus, problems = check._asked()
    at_work = smi.query(smi.AT_WORK)
    for number, (gpu, more) in enumerate(zip(gpus, at_work, strict=True)):
        gpu.update(more)
        gpu.update({"gemm_tflops": 680.0, "copy_gb_per_s": 2650.0, "host_gb_per_s": 54.0})
        gpu.update(figures.get(f"gpu{number}", {}))
    return [*problems, *judge.problems(gpus, wanted, H100)]


def test_a_healthy_node_has_no_problem(node):
    assert asked_and_judged() == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ecc.errors.uncorrected.volatile.total": "3"}, "GPU 5: 3 uncorrected ECC errors since the driver was loaded"),
        ({"ecc.mode.current": "Disabled"}, "GPU 5: ECC is off"),
        ({"remapped_rows.pending": "Yes"}, "GPU 5: memory rows wait to be replaced: the GPU must be reset"),
        ({"remapped_rows.failure": "1"}, "GPU 5: memory rows could not be replaced"),
        ({"memory.used": "20480"}, "GPU 5: 20.0 GiB of its memory are in use by somebody else"),
        ({"clocks_event_reasons.active": "0x0000000000000048"}, "GPU 5: its clock is held back: hardware slowdown, thermal"),
        ({"clocks_event_reasons.active": "0x0000000000000080"}, "GPU 5: its clock is held back: power brake at 58 °C"),
        ({"clocks.sm": "345"}, "GPU 5: its clock is 345 of 1980 MHz under load at 58 °C"),
        ({"pcie.link.width.current": "8"}, "GPU 5: its PCIe link has width 8, it can have 16"),
        ({"pcie.link.gen.current": "1"}, "GPU 5: its PCIe link has generation 1, it can have 5"),
        ({"name": "NVIDIA H200"}, "GPU 5: is a NVIDIA H200, the plan is for H100"),
        ({"ecc.mode.current": "[GPU requires reset]"}, "GPU 5: ecc.mode.current is [GPU requires reset]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_gpu_that_is_not_well_is_named(node, change, said):
    node(CHANGE={"5": change})
    (problem,) = asked_and_judged()
    assert problem.startswith(said)


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"gemm_tflops": 480.0}, "a GEMM reaches 480 TFLOP/s, the peak is 989"),
        ({"copy_gb_per_s": 1500.0}, "a copy reaches 1500 GB/s, its memory has 3350 GB/s"),
        ({"host_gb_per_s": 12.0}, "host_gb_per_s is 12, that of the node's other GPUs 54"),
        ({"gemm_tflops": 590.0}, "gemm_tflops is 590, that of the node's other GPUs 680"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_slow_gpu_is_named(node, figures, said):
    assert f"GPU 2: {said}" in asked_and_judged(gpu2=figures)


def test_a_gpu_is_compared_with_what_was_measured_of_its_kind():
    slow, fine = ({"name": "NVIDIA H200", "gemm_tflops": rate} for rate in (500.0, 700.0))
    assert judge.problems([slow], 1, H200) == ["GPU 0: a GEMM reaches 500 TFLOP/s, this GPU was measured at 729"]
    assert judge.problems([fine], 1, H200) == []


def test_what_an_h200_really_said_is_well():
    """nodes/h200.json: what the check of a training wrote on one H200, but for the names of the node and the GPU."""
    found = json.loads(Path(__file__).with_name("nodes").joinpath("h200.json").read_text())
    assert judge.problems(found["devices"], 1, H200) == found["problems"] == []
    (gpu,) = found["devices"]
    assert 0.9 * H200["gemm_tflops"] < gpu["gemm_tflops"] < H200["gemm_tflops"]
    assert judge.problems([gpu | {"gemm_tflops": 500.0}], 1, H200)


def test_what_a_pair_of_h200s_really_said_is_well():
    """nodes/h200_pair.json: with NVLinks and an all-reduce, but for the names."""
    found = json.loads(Path(__file__).with_name("nodes").joinpath("h200_pair.json").read_text())
    assert judge.problems(found["devices"], 2, H200) == found["problems"] == []
    assert list(judge.of_all_reduce(found["all_reduce_gb_per_s"], H200)) == []
    links = found["devices"][1]["nvlinks"]
    assert len(links) == H200["nvlinks"]
    cut = [found["devices"][0], found["devices"][1] | {"nvlinks": [None, *links[1:]]}]
    assert judge.problems(cut, 2, H200) == ["GPU 1: 17 of 18 NVLinks are active"]


def test_what_nobody_expects_is_not_judged():
    assert judge.problems([{"gemm_tflops": 1.0, "copy_gb_per_s": 1.0, "nvlinks": []}], 1, {}) == []


def test_missing_gpus_and_links_are_told(node):
    node(GPUS="7", LINKS="16")
    assert asked_and_judged() == ["7 GPUs, the plan needs 8", "GPU 0: 16 of 18 NVLinks are active"]


def test_a_gpu_alone_needs_no_link(node):
    node(GPUS="1", LINKS="0")
    assert asked_and_judged(wanted=1) == []


@pytest.mark.parametrize(("visible", "indices"), [("2,3", ["2", "3"]), ("GPU-00000007", ["7"]), ("0", ["0"]), ("MIG-1", [])])
def test_only_the_gpus_of_this_process_count(node, monkeypatch, visible, indices):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu["index"] for gpu in smi.query(smi.AT_REST)] == (indices or [str(number) for number in range(8)])


@pytest.mark.parametrize("unknown", ["clocks_event_reasons.active", "pcie.link.gen.max"])
def test_a_driver_that_does_not_know_a_field_tells_the_others(node, unknown):
    node(UNKNOWN=unknown)
    (first, *_) = smi.query(smi.AT_WORK)
    assert first["clocks.sm"] == "1755"
    assert first["clocks_event_reasons.active"].startswith("0x")  # by its former name, if need be
    assert ("pcie.link.gen.max" in first) == (unknown != "pcie.link.gen.max")


def test_a_value_that_is_not_there_is_none():
    text = "0, GPU-1, [N/A], [Not Supported], 12\n\n1, GPU-2, x, , [Unknown Error]\n"
    fields = ("index", "uuid", "a", "b", "c")
    assert [(gpu["a"], gpu["b"], gpu["c"]) for gpu in smi.parse(text, fields)] == [
        (None, None, "12"),
        ("x", None, "[Unknown Error]"),
    ]


def test_an_all_reduce_without_nvlink_is_told():
    assert list(judge.of_all_reduce(40.0, H100)) == ["the all-reduce inside the node reaches 40 GB/s, NVLink has 450 GB/s"]
    assert list(judge.of_all_reduce(330.0, H100)) == list(judge.of_all_reduce(None, H100)) == []


# Beside the training


def told(capsys):
    out = capsys.readouterr().out
    return json.loads(re.search(r"^ftgen node: (\{.*\})$", out, re.M)[1]), out


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FTGEN_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    return tmp_path / "run"


def test_a_machine_without_gpus_says_so(run_folder, capsys):
    with beside.checked(plan_for()):
        pass
    line, out = told(capsys)
    assert line == {"node": "node7", "state": "no GPU", "seconds": line["seconds"], "problems": []}
    assert "ftgen: node node7: no GPU to check\n" in out
    assert line["seconds"] < 5
    written = json.loads((run_folder / "nodes" / "node7.json").read_text())
    assert written["host"]["cpus"] >= 1
    assert written["host"]["memory_free_gib"] > 0


def test_only_the_first_rank_of_a_node_checks(run_folder, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with beside.checked(plan_for()):
        pass
    assert capsys.readouterr().out == ""


def test_a_site_can_switch_it_off(run_folder, capsys):
    with beside.checked(plan_for(on=False)):
        pass
    assert (capsys.readouterr().out, run_folder.exists()) == ("", False)


def test_a_bad_node_is_told_and_the_run_goes_on(run_folder, capsys, node):
    """This machine's PyTorch finds no GPU, whatever nvidia-smi says."""
    node(GPUS="1", CHANGE={"0": {"ecc.errors.uncorrected.volatile.total": "3"}})
    with beside.checked(plan_for("h100", expected=H100)):
        pass
    line, out = told(capsys)
    assert (line["node"], line["state"], line["gpu"]) == ("node7", "bad", "NVIDIA H100 80GB HBM3")
    problems = ["PyTorch finds no GPU", "GPU 0: 3 uncorrected ECC errors since the driver was loaded"]
    assert line["problems"] == problems
    for problem in problems:
        assert f"ftgen: warning: node node7 is not well: {problem}\n" in out
    written = json.loads((run_folder / "nodes" / "node7.json").read_text())
    assert written["devices"][0]["vbios_version"] == "96.00.89.00.01"


def test_a_bad_node_ends_the_run_where_the_site_wants_it(run_folder, capsys, node):
    node(GPUS="1")
    with (
        pytest.raises(JobError, match="node node7 is not well: PyTorch finds no GPU") as error,
        beside.checked(plan_for("h100", bad="stop", expected=H100)),
    ):
        pass
    assert 'set bad = "warn" in [node_check]' in error.value.hint


def test_a_check_that_does_not_end_is_a_problem_of_the_node(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(beside, "LIMIT_S", 0.01)
    with beside.checked(plan_for("h100")):
        pass
    line, _ = told(capsys)
    assert line["problems"] == ["the check did not end within 0 s: a GPU may hang"]


def test_an_error_of_the_imports_is_not_hidden(run_folder):
    with pytest.raises(ImportError, match="no NeMo"), beside.checked(plan_for()):
        raise ImportError("no NeMo")


def test_a_line_is_short_enough_for_srun(run_folder, capsys, monkeypatch):
    many = [f"GPU {number}: its clock is held back: hardware slowdown, thermal slowdown at 90 °C" for number in range(64)]
    beside._tell({"node": "node7", "state": "bad", "problems": many})
    line, out = told(capsys)
    assert len(json.dumps(line)) < 1000
    assert line["problems"][-1] == f"and {64 - len(line['problems']) + 1} more"
    assert out.count("is not well") == 64


def test_the_reader_names_a_bad_node_beside_its_figures(tmp_path, capsys, run_folder):
    real = next((HERE.parent / "logs" / "h100").rglob("log-*1795387558_0.out")).read_text()
    beside._tell({"node": "node3", "state": "bad", "problems": ["GPU 5: ECC is off"]})
    beside._tell({"node": "node4", "state": "well", "problems": []})
    lines = capsys.readouterr().out
    head, rest = real.split("\n", 1)
    log = tmp_path / "log-a.lora_nemo_llama3_8b_fp8_1_7_0.out"
    log.write_text(f"{head}\n{lines}{rest}")
    (run,) = find_runs([log])
    summary = summarize(run)
    assert summary.warnings == ("node node3 was not well: GPU 5: ECC is off",)
    assert summary.status == "complete"
    done = subprocess.run(
        [sys.executable, "-m", "ftgen", "tabulate", log], capture_output=True, text=True, check=True, cwd=HERE.parents[1]
    )
    assert "node node3 was not well: GPU 5: ECC is off" in " ".join(done.stdout.split())


def test_the_catalogue_says_where_each_expectation_is_from():
    for gpu in catalogue.gpus().values():
        assert bool(gpu.expected) == bool(gpu.expected_source), gpu.name
        assert set(gpu.expected or {}) <= {"gemm_tflops", "memory_gb_per_s", "nvlinks", "nvlink_gb_per_s"}
    files = re.findall(r"bench/results/\S+\.json", catalogue.gpus()["h200"].expected_source)
    assert all((HERE.parents[1] / file).is_file() for file in files)


def test_the_measured_rate_of_gemms_follows_from_the_profile():
    """729 TFLOP/s: LoRA BF16 of the 8B model computes two thirds of 4 x 184 TFLOP in the time of its matrix products."""
    kernels = json.loads((HERE.parents[1] / "bench/results/2026-11-22-h200-kernels.json").read_text())["lora_bf16"][
        "kernels"
    ]
    products = sum(
        each["seconds_a_step"] for each in kernels if "nvjet" in each["kernel"] or "gemm" in each["kernel"].lower()
    )
    work = 4 * 4 * 4096 * catalogue.models()["llama3_8b"].matrix_weights
    assert work / products / 1e12 == pytest.approx(catalogue.gpus()["h200"].expected["gemm_tflops"], rel=0.1)
