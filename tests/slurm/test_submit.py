"""What becomes of `sbatch a.sh b.sh c.sh`: in which order jobs run, what is queued for them, and what is not."""

import itertools
import re

from cluster import Desk, until


def trained(desk: Desk) -> list[int]:
    """Numbers of the jobs whose first rank trained, in order."""
    return [int(line.split()[2].split("/")[0]) for line in desk.events("trained:0")]


def times(desk: Desk, event: str) -> dict[int, float]:
    """When the first rank of each job reached a point, by job number."""
    return {int(line.split()[2].split("/")[0]): float(line.split()[0]) for line in desk.events(event)}


def convert(desk: Desk) -> None:
    """Have the checkpoint there."""
    job = desk.submit(desk.compile("first", site='convert = "task"\n'), PROGRAM_TRAIN_S="0")
    assert desk.ended(job).state == "COMPLETED", desk.everything()
    (desk.stage / "events").unlink()


def test_scripts_run_one_after_the_other_a_failed_one_too_and_the_chain_is_seen(desk):
    convert(desk)
    scripts = [desk.compile(name, gpus=gpus, scheme=scheme) for name, gpus, scheme in CHAIN]
    first = desk.submit(*sorted(scripts), PROGRAM_MODE="status", PROGRAM_TRAIN_S="1")
    until(lambda: len(desk.queue()) == 3, 20, desk.everything)
    second, third = first + 1, first + 2
    assert desk.queue()[1:] == [
        f"{second} ftgen_tiny_llama PENDING singleton(unfulfilled),afterany:{first}(unfulfilled)",
        f"{third} ftgen_tiny_llama PENDING singleton(unfulfilled),afterany:{second}(unfulfilled)",
    ]
    assert [line.split()[1] for line in desk.queue("%i %k")] == [f"{s}_nemo_tiny_llama_fp32_{g}" for _, g, s in CHAIN]
    desk.quiet()
    assert [(desk.job(job).state, desk.job(job).exit_code) for job in (first, second, third)] == [
        ("COMPLETED", 0),
        ("FAILED", 42),
        ("COMPLETED", 0),
    ]
    assert trained(desk) == [first, third]
    assert len(desk.events("check")) == 3
    assert f"2 of 3: job {second} runs" in desk.log(first)
    assert not desk.events("converting")  # and no job was queued for it: the numbers follow each other


CHAIN = (("a", 1, "sft"), ("b", 4, "sft"), ("c", 2, "lora"))


def test_the_chain_is_cancelled_whole_by_the_command_that_it_prints(desk):
    convert(desk)
    scripts = [desk.compile(name) for name in ("a", "b", "c")]
    first = desk.submit(*scripts, PROGRAM_TRAIN_S="30")
    until(lambda: "to cancel all of them" in desk.output(first), 20, desk.everything)
    command = re.findall(r"to cancel all of them: (scancel [\d ]+)", desk.output(first))[0].split()
    assert command[1:] == [str(first + n) for n in range(3)]
    until(lambda: desk.events("train:0"), 20, desk.everything)
    desk.cluster.call(*command)
    desk.quiet()
    assert not trained(desk)
    assert desk.log(first).endswith("exit status 143\n")


def test_cancelled_before_it_has_submitted_the_rest_a_job_submits_nothing(desk):
    scripts = [desk.compile(name) for name in ("a", "b")]
    first = desk.submit(*scripts, PROGRAM_CHECK_S="30")
    until(lambda: desk.job(first).state == "RUNNING", 20, desk.everything)
    desk.cluster.call("scancel", first)
    desk.quiet()
    assert len(desk.events("check")) <= 1
    assert "2 of 2" not in desk.output(first)


def test_a_job_that_cannot_begin_does_not_stop_those_after_it(desk):
    scripts = [desk.compile(name) for name in ("a", "b")]
    first = desk.submit(*scripts, FTGEN_PYTHON="/no/such/python")
    assert desk.ended(first).exit_code == 1
    assert desk.ended(first + 1).exit_code == 1
    assert "there is no Python: /no/such/python" in desk.log(first + 1)


def test_a_script_that_cannot_be_submitted_does_not_stop_those_after_it(desk):
    convert(desk)
    first = desk.submit(desk.compile("a"), "no_such.sh", desk.compile("c"))
    desk.quiet()
    assert trained(desk) == [first, first + 1]
    assert "2 of 3: no_such.sh could not be submitted" in desk.output(first)


def test_jobs_of_one_model_submitted_apart_run_one_at_a_time_and_of_another_beside_them(desk):
    convert(desk)
    site = 'convert = "task"\n'
    alone = [desk.compile(f"alone{n}", gpus=n, site=site) for n in (1, 2, 4)]
    other = desk.compile("other", model="llama3_8b", site=site, extra="max_steps = 30\n")
    jobs = [desk.submit(script, PROGRAM_TRAIN_S="5") for script in alone]
    until(lambda: desk.events("train:0"), 20, desk.everything)
    beside = desk.submit(other, PROGRAM_TRAIN_S="0")
    assert desk.ended(beside).state == "COMPLETED"
    assert desk.job(jobs[1]).state == "PENDING"
    desk.quiet()
    begins, ends = times(desk, "train:0:"), times(desk, "trained:0")
    assert begins.keys() == ends.keys() == {*jobs, beside}
    assert all(ends[job] <= begins[following] for job, following in itertools.pairwise(jobs))


def test_a_missing_checkpoint_is_made_by_a_job_of_one_task_that_the_run_waits_for_outside(desk):
    scripts = [desk.compile("a", gpus=16, site="gpus_per_node = 8\n"), desk.compile("b")]
    first = desk.submit(*scripts)
    assert desk.ended(first).state == "COMPLETED"
    maker, copy, after = first + 1, first + 2, first + 3
    desk.quiet()
    made = desk.job(maker)
    assert (made.state, made.nodes) == ("COMPLETED", 1)
    assert re.search(r"NumTasks=1\b", made.text)
    assert "gres/gpu=1" in made.text or "gres:gpu:1" in made.text or "gpu:1" in made.text
    assert re.search(r"TimeLimit=02:00:00", made.text)
    assert [desk.job(job).state for job in (copy, after)] == ["COMPLETED"] * 2
    assert trained(desk) == [copy, after]
    assert [line.split()[2] for line in desk.events("converting")] == [f"{maker}/0"]
    logs = {path.name for path in desk.stage.rglob("log-*.out")}
    assert logs == {
        f"log-local.sft_nemo_tiny_llama_fp32_16_{copy}_0.out",
        f"log-local.sft_nemo_tiny_llama_fp32_1_{after}_0.out",
    }
    again = desk.submit(scripts[0])
    assert desk.ended(again).state == "COMPLETED"
    assert trained(desk)[-1] == again  # it ran itself: nothing was queued for a checkpoint that is there


def test_a_conversion_that_fails_is_tried_again_in_the_run_and_its_error_is_in_the_log(desk):
    script = desk.compile("a")
    python = desk.python.read_text()
    desk.python.write_text(python.replace("exec", 'if [ "$2" = convert ]; then echo "no network"; exit 9; fi\nexec'))
    first = desk.submit(script)
    assert desk.ended(first).state == "COMPLETED"
    assert desk.ended(first + 1).exit_code == 9
    assert desk.ended(first + 2).exit_code == 9
    assert "no network" in desk.log(first + 2)
    assert "no network" in desk.log(first + 1, kind="convert")


def test_a_requeued_job_submits_the_rest_once(desk):
    convert(desk)
    scripts = [desk.compile(name) for name in ("a", "b")]
    first = desk.submit(*scripts, PROGRAM_TRAIN_S="2")
    until(lambda: desk.events("train:0"), 20, desk.everything)
    desk.cluster.call("scontrol", "requeue", first)
    desk.quiet()
    assert [(desk.job(job).state, desk.job(job).restarts) for job in (first, first + 1)] == [
        ("COMPLETED", 1),
        ("COMPLETED", 0),
    ]
    assert trained(desk) == [first, first + 1]
    assert desk.output(first).count(f"2 of 2: job {first + 1} runs") == 1
    assert desk.log(first, restart=0).endswith("exit status 143\n"), desk.everything()
    assert desk.log(first, restart=1).endswith("exit status 0\n")
    assert len(desk.events("check")) == 3


def test_what_was_said_on_the_command_line_holds_for_the_rest_too(desk):
    convert(desk)
    scripts = [desk.compile(name) for name in ("a", "b")]
    first = desk.submit("--partition=other", "--time=00:07:00", *scripts)
    desk.quiet()
    for job in (first, first + 1):
        assert "Partition=other" in desk.job(job).text
        assert "TimeLimit=00:07:00" in desk.job(job).text


def test_what_the_script_sets_does_not_reach_the_rest(desk):
    convert(desk)
    a = desk.compile("a", extra='environment = { PROGRAM_MODE = "raise" }\n')
    b = desk.compile("b")
    first = desk.submit(a, b)
    desk.quiet()
    assert [desk.job(job).state for job in (first, first + 1)] == ["FAILED", "COMPLETED"]
