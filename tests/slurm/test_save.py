"""What a job of a run with [save] does when it must stop: the script, Slurm and the guard are real, the training is not."""

import pytest
from cluster import Desk, until

TASK = 'convert = "task"\n'
SAVED = "max_steps = 600\nsave = { every_steps = 20 }\n"


def start(desk: Desk, *, site: str = TASK, mode: str = "save", gpus: int = 2, spec: str = SAVED, **more: str) -> int:
    """A run of a minute that has made a checkpoint."""
    job = desk.submit(desk.compile("spec", gpus=gpus, site=site, extra=spec, **more), PROGRAM_MODE=mode)
    until(lambda: checkpoints(desk, job), 60, desk.everything)
    return job


def checkpoints(desk: Desk, run: int) -> list[int]:
    folders = desk.stage.glob(f"logs/experiments/*/*_{run}/*/checkpoints/step_*")
    return sorted(int(path.name.removeprefix("step_")) for path in folders)


def warn(desk: Desk, job: int) -> None:
    """As Slurm does before the time limit."""
    desk.cluster.call("scancel", "--batch", "--signal=USR1", job)


def steps(desk: Desk, what: str) -> list[list[str]]:
    """Of the events of a kind: rank, step and more."""
    return [line.split()[1].split(":")[1:] for line in desk.events(what)]


def test_before_the_time_limit_every_task_is_asked_to_stop_and_the_job_goes_on_after_its_save(desk):
    job = start(desk, gpus=2)
    warn(desk, job)
    until(lambda: len(steps(desk, "resumed")) == 4, 180, desk.everything)
    stopped = {rank: (step, signal) for rank, step, signal in steps(desk, "stopped")}
    assert {signal for _, signal in stopped.values()} == {"SIGUSR1"}
    step, _ = stopped["0"]  # the real training agrees on a step: tests/runtime/test_resume.py
    assert sorted(each[1] for each in steps(desk, "resumed")) == ["0", "0", step, step]
    assert desk.job(job).restarts == 1
    log = desk.log(job, 0)
    assert "ftgen: the time limit is near: the run is saved and stops\n" in log
    assert f"ftgen: the run can go on after step {step}: sbatch spec.sh --resume {job}\nftgen: exit status 85\n" in log
    assert "ftgen: error" not in log
    desk.cluster.call("scancel", job)


def test_where_no_job_may_be_requeued_another_job_goes_on_with_the_run(desk):
    first = start(desk, site=TASK + "requeue = false\n", gpus=1)
    warn(desk, first)
    assert desk.ended(first).exit_code == 85, desk.everything()
    second = first + 1
    until(lambda: len(steps(desk, "resumed")) == 2, 60, desk.everything)
    ((_, step, _),) = steps(desk, "stopped")
    assert steps(desk, "resumed")[1] == ["0", step]
    assert f"ftgen: the job cannot be requeued: job {second} goes on with the run" in desk.output(first)
    assert desk.log(first, 1)  # in the folder of the first job, as its next attempt
    assert not list(desk.stage.glob(f"logs/experiments/*/*_{second}"))
    desk.cluster.call("scancel", second)


def test_a_training_that_does_not_stop_in_time_is_ended_and_goes_on_after_its_last_checkpoint(desk):
    site = TASK + "end_before_limit_s = 3\n"
    job = start(desk, mode="deaf", site=site, gpus=1)
    warn(desk, job)
    until(lambda: len(steps(desk, "resumed")) == 2, 180, desk.everything)
    resumed = int(steps(desk, "resumed")[1][1])
    assert resumed == max(step for step in checkpoints(desk, job) if step <= resumed) >= 20
    assert "exit status 85" in desk.log(job, 0)
    desk.cluster.call("scancel", job)


def test_a_run_that_made_no_new_checkpoint_does_not_run_again_by_itself(desk):
    script = desk.compile(
        "spec", site=TASK + "end_before_limit_s = 3\n", extra="max_steps = 600\nsave = { every_steps = 500 }\n"
    )
    job = desk.submit(script, PROGRAM_MODE="deaf")
    until(lambda: steps(desk, "resumed"), 60, desk.everything)
    warn(desk, job)
    ended = desk.ended(job, 60)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 124, 0)
    assert "the time limit is near, and the run made no new checkpoint: it does not run again by itself" in desk.log(job)


@pytest.mark.parametrize("command", ["requeue", "cancel"])
def test_slurm_itself_ends_a_job_and_the_training_saves_first(desk, command):
    job = start(desk, gpus=2)
    desk.cluster.call(*(("scontrol", "requeue", job) if command == "requeue" else ("scancel", job)))
    until(lambda: len(steps(desk, "stopped")) == 2, 60, desk.everything)
    assert {each[2] for each in steps(desk, "stopped")} == {"SIGTERM"}
    last = max(checkpoints(desk, job))
    if command == "cancel":
        assert desk.ended(job).state == "CANCELLED"
        assert f"the run can go on after step {last}: sbatch spec.sh --resume {job}" in desk.log(job)
        again = desk.submit(desk.folder / "generated/spec.sh", "--resume", job, PROGRAM_MODE="save")
    else:
        again = job
    until(lambda: len(steps(desk, "resumed")) == 4, 180, desk.everything)
    assert [each[1] for each in steps(desk, "resumed")[2:]] == [str(last)] * 2
    desk.cluster.call("scancel", again)


def test_a_run_that_is_not_there_cannot_go_on(desk):
    job = desk.submit(desk.compile("spec", site=TASK, extra=SAVED), "--resume", 999)
    assert desk.ended(job).exit_code == 1
    assert "ftgen: error: --resume: there is no run 999 in" in desk.output(job)
