"""What ftgen watch says of jobs in a real queue."""

import pytest
from cluster import until

from ftgen.cluster import squeue
from ftgen.show.follow import Follower

JOB = r"""#!/bin/bash
#SBATCH --ntasks=1
experiment=sft_nemo_llama3_8b_bf16_8
folder=$STAGE_PATH/logs/experiments/$experiment/${experiment}_$SLURM_JOB_ID/$experiment
mkdir -p "$folder"
for step in 0 1 2; do
    echo "Training epoch 0, iteration $step/2 | global_step: $step | reduced_train_loss: 9 | train_step_timing in s: 0.5 |" \
        "consumed_samples: $((32 * step + 32))"
done > "$folder/log-acct.${experiment}_${SLURM_JOB_ID}_0.out"
until [ -e "$STAGE_PATH/go" ]; do sleep 0.2; done
"""


@pytest.fixture
def watched(desk, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", desk.cluster.environment["SLURM_CONF"])
    script = desk.folder / "job.sh"
    script.write_text(JOB)
    job = desk.submit(script)
    until(lambda: len(list(desk.stage.glob("logs/**/log-*.out"))) == 1, 30, desk.everything)
    return job


def states(desk):
    return [(run.run.run_id, run.state, run.over) for run in Follower([desk.stage / "logs"], squeue.states).look()]


def test_a_job_is_in_the_state_that_the_queue_says(desk, watched):
    assert states(desk) == [(str(watched), "running", False)]  # though its log has every step: it may yet end badly
    desk.cluster.call("scontrol", "requeuehold", watched)
    until(lambda: "pending (job requeued in held state)" in str(states(desk)), 30, lambda: str(states(desk)))
    assert not states(desk)[0][2]
    desk.cluster.call("scancel", watched)
    until(lambda: states(desk)[0][2], 30, lambda: str(states(desk)))
    assert states(desk) == [(str(watched), "complete", True)]


def test_where_no_controller_answers_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "none.conf"))
    assert squeue.states() is None
