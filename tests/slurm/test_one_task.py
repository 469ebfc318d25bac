"""Real NeMo in one task of a job that has several: it must not wait for the others."""

import sys
from pathlib import Path

import pytest
from cluster import HERE, Desk, until

TWO = "gpus_per_node = 2\n"
SECONDS = 150  # for a conversion, which takes 20 s on an idle machine of two cores; a hang has no end


@pytest.fixture
def real(desk: Desk) -> Desk:
    """The real check and conversion; only the training is the stand-in."""
    program = f'exec "{sys.executable}" "{HERE / "program.py"}" "$@"'
    desk.python.write_text(f'#!/bin/sh\n[ "$2" != finetune ] || {program}\nexec "{sys.executable}" "$@"\n')
    return desk


def script(desk: Desk, convert: str, gpus: int = 4) -> Path:
    return desk.compile("spec", gpus=gpus, source="random", site=f'convert = "{convert}"\n{TWO}')


def converted(desk: Desk, job: int) -> None:
    assert desk.job(job).state == "COMPLETED", desk.everything()
    assert "ftgen: the converted checkpoint is ready: " in desk.log(job)
    assert len(desk.events("train:")) == 4
    assert not [line for line in desk.events("train:") if "PARTIAL" in line]


def test_a_conversion_in_one_task_of_a_job_with_several_ends(real):
    job = real.submit(script(real, "task"))
    real.ended(job, SECONDS)
    converted(real, job)


def test_a_conversion_ends_in_the_run_itself_where_jobs_cannot_submit_jobs(real):
    """While the job runs, Slurm takes no job from any node of this machine, as where only login nodes may submit."""
    wait = 'until [ "$2" != check ] || [ -e "$STAGE_PATH/go" ]; do touch "$STAGE_PATH/here"; sleep 0.1; done\n'
    real.python.write_text(real.python.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\n{wait}"))
    job = real.submit(script(real, "job"))
    until((real.stage / "here").exists, 30, real.everything)
    real.cluster.call("scontrol", "update", "partitionname=main", "allocnodes=login")
    try:
        (real.stage / "go").touch()
        real.ended(job, SECONDS)
    finally:
        real.cluster.call("scontrol", "update", "partitionname=main", "allocnodes=ALL")
    log = real.log(job)
    assert "sbatch: error: Batch job submission failed: Access/permission denied" in log
    assert "cannot submit a job for the conversion: this job converts the checkpoint itself" in log
    converted(real, job)


def test_the_entrypoint_by_hand_in_a_session_of_several_tasks_ends(real):
    """As a user tries it: in an salloc, with what an earlier torchrun and an image have left."""
    real.call("bash", script(real, "task"), "--unpack", real.folder / "code")
    session = ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=2", "timeout", SECONDS]
    stale = {"RANK": "7", "WORLD_SIZE": "16", "LOCAL_RANK": "7", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}
    said = real.call(*session, sys.executable, real.folder / "code/spec.py", "convert", **stale, OMPI_COMM_WORLD_SIZE="16")
    assert "ftgen: the converted checkpoint is ready: " in said
