"""A job that makes no progress says where it waits, again and again, and goes on."""

import re

from cluster import until

SITE = 'convert = "task"\ngpus_per_node = 2\n'


def test_a_training_that_hangs_says_in_which_calls_and_goes_on(desk):
    script = desk.compile("spec", gpus=4, site=SITE)
    job = desk.submit(script, FTGEN_QUIET_S="2", PROGRAM_MODE="status", PROGRAM_TRAIN_S="12")
    assert desk.ended(job, 60).exit_code == 42, desk.everything()  # rank 3, after 12 s; the others would take a minute
    log = desk.log(job)
    lines = re.findall(r"^ftgen: no output for (\d+) s: waiting for finetune, .*$", log, re.MULTILINE)
    assert len(lines) >= 2, log
    assert sorted(lines, key=int) == lines
    assert re.search(rf"\(step {job}\.0 on node\[1-2\] for 0:\d\d\)", log), log
    assert re.search(r"innermost first \(other ranks: .*/stacks\)\n    \S+/program\.py:\d+ train\n", log), log
    assert "no output for" in desk.output(job)
    (folder,) = desk.stage.glob(f"logs/experiments/*/*_{job}/*/stacks")
    calls = {path.name: path.read_text() for path in folder.glob("*.txt")}
    assert sorted(calls) == [f"finetune_{rank}.txt" for rank in range(4)]
    assert all("program.py" in text for text in calls.values())


def test_a_conversion_that_hangs_says_so_too_and_a_busy_one_does_not(desk):
    script = desk.compile("spec", site=SITE)
    job = desk.submit(script, FTGEN_QUIET_S="2", PROGRAM_CONVERT_S="10")
    assert desk.ended(job).state == "COMPLETED", desk.everything()
    log = desk.log(job)
    assert re.search(r"^ftgen: no output for \d+ s: waiting for convert, .* \(process \d+\)$", log, re.MULTILINE), log
    assert re.search(r"^    \S+/program\.py:\d+ import_directory$", log, re.MULTILINE), log
    talking = desk.python.read_text().replace("exec", "(for n in 1 2 3 4 5 6; do sleep 1; echo $n; done) &\nexec", 1)
    desk.python.write_text(talking)
    job = desk.submit(script, FTGEN_QUIET_S="3", PROGRAM_TRAIN_S="5")
    assert desk.ended(job).state == "COMPLETED", desk.everything()
    assert "no output" not in desk.log(job)


def test_a_step_that_never_reaches_python_says_so(desk):
    desk.python.write_text("#!/bin/sh\nsleep 40\n")  # an image that takes long to start
    job = desk.submit(desk.compile("spec", site=SITE), FTGEN_QUIET_S="2")
    until(lambda: "it has not reached Python yet, or waits outside of it" in desk.everything(), 60, desk.everything)
    desk.cluster.call("scancel", job)
    assert desk.ended(job).state == "CANCELLED"


def test_a_hang_that_holds_python_s_lock_is_printed_by_faulthandler(desk):
    job = desk.submit(desk.compile("spec", site=SITE), FTGEN_QUIET_S="2", PROGRAM_MODE="locked", PROGRAM_TRAIN_S="6")
    assert desk.ended(job).state == "COMPLETED", desk.everything()
    log = desk.log(job)
    assert "Timeout (0:00:02)!" in log
    assert re.search(r'File ".*program\.py", line \d+ in train', log)


def test_no_watch_is_left_when_the_job_has_ended(desk):
    """The watch sleeps between two looks. Slurm would wait for its sleep."""
    job = desk.submit(desk.compile("spec", site=SITE), FTGEN_QUIET_S="1200")
    ended = desk.ended(job)
    (seconds,) = re.findall(r"RunTime=00:00:(\d\d)", ended.text)
    assert int(seconds) < 20, ended.text
    assert "error" not in desk.log(job)
