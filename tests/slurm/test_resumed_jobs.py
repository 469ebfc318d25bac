"""Real trainings in a real Slurm that are warned, requeued and killed: they end with what an uninterrupted one has."""

import pytest
from cluster import until
from training import STEPS, Training, lines, repeated

pytestmark = pytest.mark.runtime


def test_a_run_survives_the_time_limit_a_requeue_and_a_killed_task(desk):
    training = Training(desk, gpus=2)
    whole = training.whole()
    # The first attempt is warned of its time limit, the second one is requeued, and in the third one rank 1 dies.
    run = training.submit(STEP_S="1", WORKERS="1", MOMENT="never:0:KILL:0 never:0:KILL:0 step:11:KILL:1")
    training.until_step(run, 2)
    desk.cluster.call("scancel", "--batch", "--signal=USR1", run)
    until(lambda: desk.job(run).restarts == 1, 120, desk.everything)
    warned = max(step for kind, step in training.made(run) if kind == "step")
    training.until_step(run, warned + 1)
    desk.cluster.call("scontrol", "requeue", run)
    until(lambda: desk.job(run).restarts == 2, 120, desk.everything)
    assert desk.ended(run, 240).exit_code == 137, desk.everything()
    last = training.resume(run)
    assert desk.ended(last, 240).state == "COMPLETED", desk.everything()

    directory = training.run_directory(run)
    for rank in (0, 1):
        assert lines(directory, rank) == lines(whole, rank)
    assert len(lines(whole)) == STEPS + 3
    assert repeated(directory) <= 2  # of the killed attempt, since its last save
    assert {path.name for path in (directory / "checkpoints").glob("step_*")} == {"step_9", "step_12"}
    assert len(list(directory.glob("log-*.out"))) == 4
