"""Jobs submitted from within another job: nothing of that session reaches their steps."""

import re
from pathlib import Path

import pytest
from cluster import SITE, Desk, until

TWO_BY_TWO = 'convert = "task"\ngpus_per_node = 2\n'
# Not set in a test: sbatch itself would follow or refuse these.
READ_BY_SBATCH = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_HINT", "SLURM_HOSTFILE", "SLURM_UMASK", "SLURM_JWT"}
# The session of the submission, as `srun` or `salloc` starts it, and a variable that it leaves in a job's environment.
SESSIONS = {
    "srun --mem-per-cpu=100": "SLURM_SRUN_COMM_PORT",
    "srun --gpus=1": "SLURM_STEP_NODELIST",
    "salloc --quiet --gpus=1": "SLURM_GPUS",
    "srun --gpus-per-task=1 --ntasks=1": "SLURM_STEP_ID",
    "srun --distribution=cyclic": "SLURM_DISTRIBUTION",
    "srun --cpus-per-task=2 --cpu-bind=rank --exact": "SLURM_CPU_BIND",
    "srun --pty --gres=gpu:3": "SLURM_STEP_ID",
    "salloc --quiet --gpus-per-task=1 --ntasks=1": "SLURM_GPUS_PER_TASK",
    "salloc --quiet --gpus=2 --ntasks-per-gpu=1": "SLURM_NTASKS_PER_GPU",
    "salloc --quiet --gres=gpu:1 --gpu-bind=single:1": "SLURM_GPU_BIND",
    "salloc --quiet --mem-per-gpu=100 --gpus=1": "SLURM_MEM_PER_GPU",
}


def ranks(desk: Desk, job: int) -> dict[int, list[str]]:
    """What each rank printed: local rank, node rank, ..., host, number of GPUs."""
    return {int(rank): rest.split() for rank, rest in re.findall(r"^rank (\d+): (.*)$", desk.log(job), re.MULTILINE)}


def in_blocks(desk: Desk, job: int) -> None:
    """Four ranks, two to a node in their order, and each sees both GPUs of its node."""
    assert desk.job(job).state == "COMPLETED", desk.everything()
    found = ranks(desk, job)
    assert [(int(rank[0]), int(rank[1]), rank[7]) for _, rank in sorted(found.items())] == [
        (0, 0, "2"),
        (1, 0, "2"),
        (0, 1, "2"),
        (1, 1, "2"),
    ]
    first, second = found[0][6], found[2][6]
    assert f"ftgen: ranks 0-1 on {first}, 2-3 on {second}, as local ranks 0-1 of each node\n" in desk.log(job)


@pytest.mark.parametrize("session", SESSIONS)
def test_a_job_of_a_session_is_as_one_of_a_login_node(desk, session):
    script = desk.compile("spec", gpus=4, site=TWO_BY_TWO)
    job = desk.submit_in(session.split(), script)
    desk.ended(job, 90)
    in_blocks(desk, job)
    (line,) = re.findall(r"^ftgen: not used, because they are those of the session that .*$", desk.log(job), re.MULTILINE)
    assert SESSIONS[session] in line.split()


def test_a_job_of_a_login_node_has_nothing_to_drop(desk):
    job = desk.submit(desk.compile("spec", gpus=4, site=TWO_BY_TWO))
    desk.ended(job)
    in_blocks(desk, job)
    assert "not used" not in desk.log(job)


@pytest.mark.parametrize(
    "option", ["--gpus-per-task=1", "--gpus=4", "--gpu-bind=single:1", "--distribution=cyclic", "--job-name=interactive"]
)
def test_an_option_of_the_command_line_does_not_change_where_ranks_are(desk, option):
    job = desk.submit(option, desk.compile("spec", gpus=4, site=TWO_BY_TWO))
    desk.ended(job)
    in_blocks(desk, job)


def known_to_slurm() -> set[str]:
    """Every variable that is named in Slurm's programs."""
    (library,) = Path("/usr/lib").glob("*/slurm*/libslurmfull.so")
    texts = [
        path.read_bytes() for path in (library, Path("/usr/bin/srun"), Path("/usr/bin/sbatch"), Path("/usr/bin/salloc"))
    ]
    found = {name.decode() for text in texts for name in re.findall(rb"\b(?:SLURM|SRUN|SLURMD)_[A-Z0-9_]*[A-Z0-9]\b", text)}
    assert len(found) > 100
    return found


def test_no_variable_that_slurm_knows_comes_through(desk):
    """Each variable has a value that no job has. What each step finds is in a file."""
    inner = desk.python.read_text()
    desk.python.write_text(inner.replace("exec", 'env >"$STAGE_PATH/env.$2.${SLURM_PROCID:-alone}"\nexec', 1))
    names = known_to_slurm() - READ_BY_SBATCH
    names |= {"SLURM_TRES_PER_TASK", "SLURM_NEVER_HEARD_OF", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE"}
    names |= {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"}
    job = desk.submit(desk.compile("spec", gpus=4, site=TWO_BY_TWO), **dict.fromkeys(names, "poison"))
    desk.ended(job, 90)
    in_blocks(desk, job)
    found = {path.name: path.read_text() for path in desk.stage.glob("env.*")}
    assert sorted(found) == ["env.check.alone", "env.convert.alone", *(f"env.finetune.{rank}" for rank in range(4))]
    for name, text in found.items():
        # facts that Slurm sets only if there are any, and that no program takes for an option
        left = {line.partition("=")[0] for line in text.splitlines() if line.endswith("=poison")}
        assert left <= {"SLURM_JOB_DEPENDENCY", "SLURM_JOB_QOS", "SLURM_JOB_RESERVATION", "SLURM_CONF_SERVER"}, name
        assert ("SLURM_NTASKS=" in text) == ("finetune" in name)
        assert "\nSLURM_JOB_ACCOUNT" not in text
        assert "\nSLURM_RESTART_COUNT" not in text


def test_a_session_s_restarts_are_not_those_of_the_job(desk):
    script = desk.compile("spec", site=TWO_BY_TWO)
    job = desk.submit(script, SLURM_RESTART_COUNT="3", PROGRAM_TRAIN_S="30")
    until(lambda: desk.events("train:0"), 30, desk.everything)
    assert desk.log(job, restart=0)
    desk.cluster.call("scontrol", "requeue", job)
    until(lambda: len(desk.events("train:0")) == 2, 60, desk.everything)
    assert desk.log(job, restart=1)


def test_where_whole_nodes_come_with_their_gpus_a_session_s_list_of_gpus_is_dropped(desk):
    script = desk.compile("spec", gpus=2, site=SITE.replace('"gres"', '"none"') + TWO_BY_TWO)
    job = desk.submit(script, CUDA_VISIBLE_DEVICES="1,2,3", ROCR_VISIBLE_DEVICES="1,2,3")
    desk.ended(job)
    assert {rank[7] for rank in ranks(desk, job).values()} == {"1"}  # the variable is not set


def test_a_script_that_runs_in_the_session_itself_has_its_ranks_in_blocks_too(desk):
    script = desk.compile("spec", gpus=4, site=TWO_BY_TWO)
    options = ["--quiet", "--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2", "--gpu-bind=single:1", "--distribution=cyclic"]
    job = desk.run_in(["salloc", *options], "bash", script)
    in_blocks(desk, job)


def test_a_script_that_runs_in_a_step_of_the_session_shares_its_cpus(desk):
    """Without --overlap, the script's steps would wait for the step that runs the script."""
    script = desk.compile("spec", gpus=2, site=TWO_BY_TWO)
    job = desk.run_in(
        ["srun", "--nodes=1", "--ntasks=1", "--cpus-per-task=2", "--gres=gpu:2"], "bash", "-c", f"bash {script}; :"
    )
    assert sorted(ranks(desk, job)) == [0, 1], desk.everything()


def test_a_rank_in_the_wrong_place_ends_the_job_and_says_why(desk):
    """An srun of the site that deals ranks out over nodes, whatever its options say."""
    tools = desk.folder / "tools"
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/bash\nexec /usr/bin/srun "${@/--distribution=block/--distribution=cyclic}"\n')
    (tools / "srun").chmod(0o755)
    path = {"PATH": f"{tools}:{desk.cluster.environment['PATH']}"}
    job = desk.submit(desk.compile("spec", gpus=4, site=TWO_BY_TWO), **path)
    assert desk.ended(job).state == "FAILED"
    log = desk.log(job)
    # ranks 1 and 2 are in the wrong places: the first to say so may end the other before that has spoken
    errors = [
        r"\[rank 1 on node\d\] ftgen: error: rank 1 must be local rank 1 of node 0, but is local rank 0 of node 1",
        r"\[rank 2 on node\d\] ftgen: error: rank 2 must be local rank 0 of node 1, but is local rank 1 of node 0",
    ]
    assert re.search("|".join(errors), log), log
    assert "hint: remove --distribution and --nodelist from srun_flags" in log
    assert not desk.events("trained")


def test_a_rank_that_sees_too_few_gpus_ends_the_job_and_says_why(desk):
    site = TWO_BY_TWO + 'srun_flags = ["--gres=gpu:1"]\n'
    job = desk.submit(desk.compile("spec", gpus=2, scheme="lora", model="llama3_8b", site=site, gpu="h100"))
    assert desk.ended(job).state == "FAILED", desk.everything()
    assert "this rank can use only 1 of its node's 2 GPUs (CUDA_VISIBLE_DEVICES=0)\n" in desk.log(job)
    assert "hint: every rank needs all GPUs of its node" in desk.log(job)


def test_variables_that_were_not_exported_are_missed_and_not_silently_replaced(desk):
    script = desk.compile("spec", site=TWO_BY_TWO)
    job = desk.submit("--export=NONE", script)
    assert desk.ended(job).exit_code == 1
    said = desk.output(job)
    assert "ftgen: error: STAGE_PATH did not reach this job: it was submitted with --export=NONE or SBATCH_EXPORT\n" in said
    assert "hint: submit with --export=ALL, or set stage_path in the site profile" in said
    assert not (desk.folder / "logs").exists()
    job = desk.submit(script, SBATCH_EXPORT="STAGE_PATH")
    desk.ended(job)
    assert "ftgen: warning: submitted with --export=STAGE_PATH (or SBATCH_EXPORT)" in desk.log(job)
