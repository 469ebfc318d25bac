"""A run that is killed and resumed trains what an uninterrupted one does, bit for bit. Real NeMo on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interrupted import AGAIN, DROPOUT, STEPS, Kill, lines, resumable, train
from stages import Stage

pytestmark = pytest.mark.runtime
WHOLE = {("step", step) for step in range(1, STEPS + 1)} | {("validation", step) for step in (4, 8, 12)}


@pytest.fixture(scope="session")
def stage(make_stage: Callable[[], Stage]) -> Stage:
    """A stage with a converted checkpoint."""
    stage = make_stage()
    status, output = stage.run(resumable(), "convert")
    assert status == 0, output
    return stage


# Between two saves; while the weights of a checkpoint are written; asked to stop at a step that is also validated; when only
# the name of a checkpoint is missing.
KILLS = [Kill("step", 5), Kill("weights", 6), Kill("step", 8, "USR1"), Kill("rename", 9)]
CASES: dict[str, tuple[dict[str, Any], list[Kill]]] = {
    "sft": ({}, KILLS),
    "packed-lora-dropout": ({"packed": True, **DROPOUT}, KILLS[1:]),
    # the signals reach the processes that load data too
    "two-ranks-lora-dropout": (
        {"gpus": 2, "gpus_per_node": 2, **DROPOUT},
        [Kill("step", 8, "TERM", 1), Kill("step", 11, "KILL", 1)],
    ),
}


def batches_counted(checkpoint: Path) -> dict[str, int]:
    """Lightning's count of the batches of the epoch."""
    import torch

    state = torch.load(checkpoint / "weights" / "common.pt", weights_only=False)
    return dict(state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"])


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_trains_what_an_uninterrupted_one_does(stage: Stage, case: str) -> None:
    changes, kills = CASES[case]
    document = resumable(**changes)
    legs = [train(stage, document, f"{case}-killed", kill, WORKERS="1") for kill in [*kills, None]]
    assert [leg.statuses[kill.rank] for leg, kill in zip(legs, kills, strict=False)] == [
        -9 if kill.signal == "KILL" else AGAIN for kill in kills
    ], [leg.output[-2000:] for leg in legs]
    assert set(legs[-1].statuses) == {0}, legs[-1].output
    whole = train(stage, document, f"{case}-whole")
    assert set(whole.statuses) == {0}, whole.output
    for rank in range(document["gpus"]):
        expected = lines(stage.path / f"{case}-whole", rank)
        assert set(expected) == WHOLE
        assert lines(stage.path / f"{case}-killed", rank) == expected
    for name in ("killed", "whole"):
        assert set(batches_counted(stage.path / f"{case}-{name}" / "checkpoints" / "step_9").values()) == {9}
