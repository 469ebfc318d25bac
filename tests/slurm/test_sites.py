"""What sites ask for differently: memory, CPUs, other resources, comments, names, files, addresses, a command in front."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import ROOT, Desk

TASK = 'convert = "task"\ngpu_request = "gres"\nmpi = "none"\nexclusive = false\n'
ALL_OF_IT = 'convert = "task"\ngpu_request = "gres"\nmpi = "none"\n'


def run(desk: Desk, site: str, gpus: int = 2, **environment: str) -> int:
    """A job on this site that has ended well."""
    job = desk.submit(desk.compile("spec", gpus=gpus, site=site), **environment)
    assert desk.ended(job, 90).state == "COMPLETED", desk.everything()
    return job


def header(script: Path) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]


@pytest.mark.parametrize(
    ("keys", "option", "record"),
    [
        ('mem = "none"', None, "MinMemoryCPU=1000M"),  # the cluster's DefMemPerCPU
        ("", None, "MinMemoryCPU=1000M"),  # a part of a node does not take all of its memory
        ('mem = "500"', "--mem=500", "MinMemoryNode=500M"),
        ('mem_per_cpu = "300"', "--mem-per-cpu=300", "MinMemoryCPU=300M"),
        ('mem_per_gpu = "400"', "--mem-per-gpu=400", "mem=800M"),
    ],
)
def test_memory_is_asked_for_as_the_site_wants_it(desk, keys, option, record):
    job = run(desk, f"{TASK}{keys}\n")
    assert [each for each in header(desk.folder / "generated/spec.sh") if each.startswith("--mem")] == [option] * bool(
        option
    )
    assert record in desk.job(job).text


def test_whole_nodes_come_with_their_memory_unless_the_site_does_not_want_to_be_asked(desk):
    assert "MinMemoryNode=0" in desk.job(run(desk, ALL_OF_IT)).text
    assert "MinMemoryNode=0" not in desk.job(run(desk, f'{ALL_OF_IT}mem = "none"\n')).text


OTHER_MEMORY = 'convert_flags = ["--mem=700", "--partition=other"]\n'


@pytest.mark.parametrize(
    ("memory", "flags", "record"),
    [
        ('mem_per_gpu = "400"', "", "mem=400M"),
        ('mem_per_cpu = "400"', "", "MinMemoryCPU=400M"),
        ('mem = "none"', "", "MinMemoryCPU=1000M"),
        ('mem = "900"', OTHER_MEMORY, "MinMemoryNode=700M"),
        ('mem_per_gpu = "400"', OTHER_MEMORY, "MinMemoryNode=700M"),
    ],
)
def test_the_conversion_job_asks_for_memory_once(desk, memory, flags, record):
    """sbatch refuses two ways to ask for memory, also if one is in the script and one on its command line."""
    first = desk.submit(desk.compile("spec", gpus=2, site=f"{TASK.partition(chr(10))[2]}{memory}\n{flags}"))
    desk.quiet()
    assert [desk.job(first + n).state for n in range(3)] == ["COMPLETED"] * 3, desk.everything()
    conversion = desk.job(first + 1).text
    assert "converts it on one node" in desk.output(first)
    assert record in conversion
    assert ("Partition=other" in conversion) == bool(flags)


def test_a_part_of_a_node_has_the_cpus_of_its_gpus_in_each_task(desk):
    job = run(desk, f"{TASK}cpus_per_gpu = 3\n", PROGRAM_SHOW="SLURM_CPUS_PER_TASK SLURM_CPUS_ON_NODE")
    assert "NumCPUs=6 NumTasks=2 CPUs/Task=3" in desk.job(job).text
    assert desk.shown(job, "SLURM_CPUS_PER_TASK") == ["3", "3"]
    assert desk.shown(job, "SLURM_CPUS_ON_NODE") == ["6", "6"]
    # since Slurm 22.05, srun does not take it from sbatch
    step = re.findall(r"await srun [^\n]*\\\n[^\n]*", (desk.folder / "generated/spec.sh").read_text())
    assert any("--cpus-per-task=3" in each for each in step), step


def test_json_and_spaces_in_a_flag_reach_slurm_as_they_are(desk):
    comment = '{"Reaper":{"exemptIdleTimeMins":"120","reason":"it\'s a \\"bench\\" # $HOME `id` C:\\\\x"}}'
    job = run(desk, f"{TASK}sbatch_flags = ['''--comment={comment}''']\n")
    assert f"Comment={comment} " in desk.job(job).text


def test_names_output_and_other_resources_of_a_site(desk):
    folder = desk.folder / "slurm out"
    folder.mkdir()
    site = f'{TASK}job_name_prefix = "acct-team."\noutput_folder = "{folder}"\ngres = ["nvme:1"]\n'
    job = run(desk, site)
    text = desk.job(job).text
    assert "JobName=acct-team.ftgen_tiny_llama\n" in text
    assert "TresPerNode=gres:gpu:2,gres:nvme:1" in text
    (output,) = folder.iterdir()
    assert output.name == f"sbatch_sft_nemo_tiny_llama_fp32_2_{job}.out"
    assert "ftgen: log: " in output.read_text()
    assert not list(desk.folder.glob("sbatch_*.out"))


@pytest.mark.parametrize(
    ("request_", "expected"),
    [('gpu_request = "gpus-per-node"', {"gres:gpu:2", "gres:nvme:1"}), ('gpu_request = "none"', {"gres:nvme:1"})],
)
def test_other_resources_go_with_every_way_to_ask_for_gpus(desk, request_, expected):
    site = f'{request_}\nmpi = "none"\nexclusive = false\ngres = ["nvme:1"]\n'
    first = desk.submit(desk.compile("spec", gpus=2, site=site))
    desk.quiet()
    assert [desk.job(first + n).state for n in range(3)] == ["COMPLETED"] * 3, desk.everything()
    asked = re.findall(r"gres:[a-z]+:\d", desk.job(first).text)
    assert set(asked) == expected
    conversion = re.findall(r"gres:[a-z]+:\d", desk.job(first + 1).text)
    assert set(conversion) == {each.replace("gpu:2", "gpu:1") for each in expected}


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ('"10.9.8.7"', "10.9.8.7"),
        ('"interface:lo"', "127.0.0.1"),
        ('["echo", "host-of-$HOME", "more"]', "host-of-$HOME"),  # a list of words is no line for a shell
        ('["sh", "-c", "hostname | tr n N"]', "Node1"),
    ],
)
def test_the_address_of_the_first_node_is_what_the_site_says(desk, address, found):
    job = desk.submit(
        "--nodelist=node1", desk.compile("spec", gpus=2, site=f"{TASK}master_addr = {address}\n"), PROGRAM_SHOW="MASTER_ADDR"
    )
    assert desk.ended(job).state == "COMPLETED", desk.everything()
    assert desk.shown(job, "MASTER_ADDR") == [found, found]


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ('"interface:ib7"', "master_addr: node1 has no network interface ib7 with an IPv4 address\n  hint: ip -brief"),
        ('["false", "x"]', "master_addr: on node1, this command prints no address: false x\n  hint: correct the site"),
        ('["no-such-program"]', "master_addr: on node1, this command prints no address: no-such-program\n"),
    ],
)
def test_an_address_that_is_not_there_ends_the_job(desk, address, error):
    script = desk.compile("spec", site=f"{TASK}master_addr = {address}\n")
    job = desk.submit("--nodelist=node1", script)
    assert desk.ended(job).exit_code == 1
    assert f"ftgen: error: {error}" in desk.log(job)
    assert not desk.events("check")


def test_a_command_stands_before_python_in_each_task_of_the_training_and_knows_its_rank(desk):
    words = ["env", "NUMA={local_rank//2}", "PLACE={rank}.{node_rank}.{local_rank}", "TEXT=a b$(id)"]
    site = f"{ALL_OF_IT}gpus_per_node = 4\nprefix = {words}\n"
    job = run(desk, site, gpus=8, PROGRAM_SHOW="NUMA PLACE TEXT")
    assert desk.shown(job, "NUMA") == ["0", "0", "1", "1"] * 2
    assert desk.shown(job, "PLACE") == [f"{rank}.{rank // 4}.{rank % 4}" for rank in range(8)]
    assert set(desk.shown(job, "TEXT")) == {"a b$(id)"}
    assert desk.log(job).count("ftgen: prefix: env NUMA=0 PLACE=0.0.0") == 1  # rank 0 says it, and nobody a second time


def test_a_prefix_that_is_not_installed_is_named(desk):
    job = desk.submit(desk.compile("spec", gpus=2, site=f"{TASK}prefix = ['numactl-of-another-site']\n"))
    assert desk.ended(job).state == "FAILED"
    assert "ftgen: error: prefix: numactl-of-another-site is not installed here\n" in desk.log(job)


def test_caches_of_compilers_are_on_the_node_unless_the_user_says_where(desk, tmp_path):
    mine = {"TORCHINDUCTOR_CACHE_DIR": "/mine", "TMPDIR": str(tmp_path)}
    job = run(desk, TASK, PROGRAM_SHOW="TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR", **mine)
    assert desk.shown(job, "TORCHINDUCTOR_CACHE_DIR") == ["/mine", "/mine"]
    assert desk.shown(job, "TRITON_CACHE_DIR") == [f"{tmp_path}/ftgen-0/triton"] * 2


def test_a_path_with_the_home_and_the_user_is_expanded_on_the_node(desk):
    place = desk.folder / "its home"
    (place / "root").mkdir(parents=True)
    (place / "bin").mkdir()
    (place / "bin/python").symlink_to(desk.python)
    site = f'{TASK}stage_path = "~/$USER"\n[python]\nkind = "venv"\npath = "$HOME"\n'
    script = desk.compile("spec", site=site)
    job = desk.submit(script, HOME=str(place), USER="root", STAGE_PATH="", FTGEN_PYTHON="")
    assert desk.ended(job).state == "COMPLETED", desk.everything()
    assert list(place.glob("root/logs/experiments/*/*/*/log-*.out"))
    missing = desk.compile("spec", site=f'{TASK}[python]\nkind = "venv"\npath = "$NO_SUCH_PLACE/venv"\n')
    job = desk.submit(missing, FTGEN_PYTHON="")
    assert desk.ended(job).state == "FAILED"
    assert "NO_SUCH_PLACE: is not set, but the site profile uses it" in desk.log(job)


def test_segments_are_only_looked_at_in_the_header_because_this_slurm_does_not_know_them(desk, tmp_path):
    """Slurm 22.05 has no --segment. The conversion job of one node must not have it."""
    (tmp_path / "spec.toml").write_text('scheme = "lora"\nprecision = "fp8"\ngpus = 16\ngpu = "gb200"\n')
    (tmp_path / "site.toml").write_text('gpu_request = "gpus-per-node"\nsegment = 18\n')
    command = [
        sys.executable,
        "-m",
        "ftgen",
        "compile",
        tmp_path / "spec.toml",
        "--site",
        tmp_path / "site.toml",
        "--out",
        tmp_path,
    ]
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT, capture_output=True)
    script = tmp_path / "spec.sh"
    lines = header(script)
    assert {"--nodes=4", "--ntasks-per-node=4", "--gpus-per-node=4", "--segment=4"} <= set(lines)
    refused = subprocess.run(
        ["sbatch", "--test-only", script], capture_output=True, text=True, check=False, env=desk.cluster.environment
    )
    assert "unrecognized option '--segment=4'" in refused.stderr
    (program,) = re.findall(r"sed -E '([^']*)' \"\$0\"", script.read_text())
    left = subprocess.run(["sed", "-E", program, script], capture_output=True, text=True, check=True).stdout
    assert "#SBATCH --time=" in left
    assert "--segment" not in left.partition("\nset -euo")[0]
