"""What a job leaves behind that did not come to its end, and what the next one makes of it."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cluster import Desk, until

TASK = 'convert = "task"\n'


def nothing_partial(desk: Desk) -> None:
    """No rank has trained on a checkpoint that is not whole, and nothing half-made is left."""
    assert not [line for line in desk.events("train:") if "PARTIAL" in line]
    models = desk.stage / "HF_ckpt/models/ftgen"
    left = {path.name for path in models.iterdir()} if models.is_dir() else set()
    assert left <= {"tiny-llama", ".tiny-llama.claims"}, left


@pytest.mark.parametrize("phase", ["check", "download", "converting", "train:0"])
def test_cancelled_in_any_phase_a_job_leaves_nothing_that_the_next_one_would_trust(desk, phase):
    script = desk.compile("spec", site=TASK)
    job = desk.submit(script, PROGRAM_CHECK_S="30" if phase == "check" else "0", PROGRAM_CONVERT_S="4", PROGRAM_TRAIN_S="30")
    until(lambda: desk.events(phase), 30, desk.everything)
    desk.cluster.call("scancel", job)
    assert desk.ended(job).state == "CANCELLED"
    desk.quiet()
    nothing_partial(desk)
    log = desk.log(job)
    assert "ftgen: error: SIGTERM: cancelled, pre-empted or requeued\n" in log
    assert "ftgen: exit status 143\n" in log  # bash may add "wait_for: No record of process"
    again = desk.submit(script)
    assert desk.ended(again).state == "COMPLETED", desk.everything()
    nothing_partial(desk)
    assert len(desk.events("converted")) == 1


def test_a_step_that_ends_before_the_script_has_its_own_signal_is_a_cancelled_job(desk):
    script, after = desk.compile("spec", site=TASK), desk.compile("after", site=TASK)
    job = desk.submit(script, after, PROGRAM_CHECK_S="30")
    until(lambda: desk.events("check"), 30, desk.everything)
    (step,) = (path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if is_check_of(desk, path))
    parent = int(re.findall(r"^PPid:\s+(\d+)", (step / "status").read_text(), re.MULTILINE)[0])
    os.kill(int(step.name), signal.SIGTERM)
    time.sleep(0.3)
    os.kill(parent, signal.SIGTERM)
    assert desk.ended(job).exit_code == 143
    assert "ftgen: error: SIGTERM: cancelled, pre-empted or requeued\n" in desk.log(job)
    assert not desk.queue()  # the second script was not submitted


def is_check_of(desk: Desk, path: Path) -> bool:
    try:
        words = path.read_bytes().split(b"\0")
    except OSError:
        return False  # it has ended
    return b"check" in words and any(word.startswith(str(desk.stage).encode()) for word in words)


def test_before_the_time_limit_the_step_is_ended_and_the_log_says_so(desk):
    script = desk.compile("spec", site=TASK, walltime="00:01:00", gpus=2)
    job = desk.submit(script, PROGRAM_TRAIN_S="300")
    ended = desk.ended(job, 80)
    assert (ended.state, ended.exit_code) == ("FAILED", 124), ended.text  # and not TIMEOUT: it came first
    log = desk.log(job)
    assert "ftgen: error: the time limit is near: the run stops now and removes its unfinished files\n" in log
    assert log.endswith("ftgen: exit status 124\n")


@pytest.mark.parametrize("phase", ["converting", "train:0"])
def test_the_warning_ends_a_conversion_and_a_training(desk, phase):
    script = desk.compile("spec", site=TASK, gpus=2)
    job = desk.submit(script, PROGRAM_CONVERT_S="8" if phase == "converting" else "0.1", PROGRAM_TRAIN_S="300")
    until(lambda: desk.events(phase), 30, desk.everything)
    desk.cluster.call("scancel", "--batch", "--signal=USR1", job)
    assert desk.ended(job, 20).exit_code == 124, desk.everything()
    nothing_partial(desk)
    assert desk.log(job).endswith("ftgen: exit status 124\n")


def test_a_step_that_does_not_end_when_asked_is_killed(desk):
    desk.python.write_text(
        "#!/bin/bash\n[ $2 = finetune ] || exit 0\ntrap '' TERM\necho up >>$STAGE_PATH/events\nwhile :; do sleep 1; done\n"
    )
    job = desk.submit(desk.compile("spec", site=TASK))
    until((desk.stage / "events").exists, 30, desk.everything)
    desk.cluster.call("scancel", "--batch", "--signal=USR1", job)
    assert desk.ended(job, 40).exit_code == 124
    until(lambda: subprocess.run(["pgrep", "-f", str(desk.python)], capture_output=True, check=False).returncode, 10)


def test_requeued_in_the_middle_of_a_conversion_a_job_makes_it_anew_and_writes_the_next_log(desk):
    job = desk.submit(desk.compile("spec", site=TASK), PROGRAM_CONVERT_S="4")
    until(lambda: desk.events("converting"), 30, desk.everything)
    desk.cluster.call("scontrol", "requeue", job)
    assert desk.ended(job, 60).state == "COMPLETED", desk.everything()
    nothing_partial(desk)
    assert [line.split()[2] for line in desk.events("converting")] == [f"{job}/0", f"{job}/1"]
    assert len(desk.events("converted")) == 1
    assert "exit status 0" not in desk.log(job, 0)
    assert desk.log(job, 1).endswith("exit status 0\n")
    assert desk.output(job).count("ftgen: log: ") == 2  # Slurm's own file is appended to


def test_pre_empted_a_job_makes_room_and_starts_over(desk):
    low = desk.compile("low", site=TASK + "requeue = true\n", gpus=8)
    high = desk.compile("high", site=TASK, gpus=8)
    job = desk.submit("--nodelist=node1", low, PROGRAM_TRAIN_S="4")
    until(lambda: desk.events("train:0"), 30, desk.everything)
    above = desk.submit("--partition=other", "--nodelist=node1", "--job-name=above", high, PROGRAM_TRAIN_S="0")
    assert desk.ended(above, 60).state == "COMPLETED", desk.everything()
    ended = desk.ended(job, 60)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), desk.everything()
    nothing_partial(desk)
    assert "ftgen: error: SIGTERM: cancelled, pre-empted or requeued\n" in desk.log(job, 0)


def test_a_job_whose_node_is_gone_runs_again_elsewhere_and_takes_over(desk):
    job = desk.submit(desk.compile("spec", site=TASK + "requeue = true\n"), PROGRAM_CONVERT_S="4")
    until(lambda: desk.events("converting"), 30, desk.everything)
    gone = desk.events("converting")[0].split()[3]
    try:
        desk.cluster.kill_node(gone)
        assert desk.ended(job, 60).state == "COMPLETED", desk.everything()
    finally:
        desk.cluster.start_node(gone)
    nothing_partial(desk)
    hosts = [line.split()[3] for line in desk.events("converting")]
    assert hosts[0] != hosts[1]
    assert desk.log(job, 1).endswith("exit status 0\n")


def test_a_site_that_wants_no_requeue_gets_none(desk):
    script = desk.compile("spec", site=TASK + "requeue = false\n")
    job = desk.submit(script, PROGRAM_TRAIN_S="30")
    until(lambda: desk.events("train:0"), 30, desk.everything)
    assert "Requeue=0" in desk.job(job).text
    desk.cluster.call("scancel", job)
