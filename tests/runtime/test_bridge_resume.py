"""Megatron-Bridge on the CPU: a run that is killed and resumed trains what an uninterrupted one does, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
from bridge import ONE_THREAD, bridge_stage, losses
from interrupted import AGAIN, DROPOUT, STEPS, Kill, Lines, lines, resumable, train
from stages import Stage

pytestmark = pytest.mark.runtime
WHOLE = {("step", step) for step in range(1, STEPS + 1)} | {("validation", step) for step in (4, 8, 12)}
LORA = {"packed": True, **DROPOUT}
CASES: dict[str, tuple[dict[str, Any], list[Kill]]] = {
    "sft": ({}, [Kill("step", 5), Kill("rename", 6)]),
    # while the weights of a checkpoint are written; asked to stop at a step that is also validated
    "packed-lora-dropout": (LORA, [Kill("weights", 6), Kill("step", 8, "USR1"), Kill("step", 10)]),
    # the signals reach the processes that load data too
    "two-ranks-lora-dropout": (
        {"gpus": 2, "gpus_per_node": 2, **DROPOUT},
        [Kill("step", 8, "TERM", 1), Kill("step", 11, "KILL", 1)],
    ),
}


def saved(**changes: Any) -> dict[str, Any]:
    return resumable(engine="megatron_bridge", **changes)


@pytest.fixture(scope="module")
def stage(make_stage: Callable[[], Stage]) -> Stage:
    """A stage with a converted checkpoint."""
    stage = bridge_stage(make_stage())
    status, output = stage.run(saved(), "convert", **ONE_THREAD)
    assert status == 0, output
    return stage


@pytest.fixture(scope="module")
def whole(stage: Stage) -> Callable[[str], list[Lines]]:
    """What each rank of the uninterrupted run of a case trained on."""
    made: dict[str, list[Lines]] = {}

    def run(case: str) -> list[Lines]:
        if case not in made:
            document = saved(**CASES[case][0])
            leg = train(stage, document, f"{case}-whole")
            assert set(leg.statuses) == {0}, leg.output
            made[case] = [lines(stage.path / f"{case}-whole", rank) for rank in range(document["gpus"])]
        return made[case]

    return run


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_trains_what_an_uninterrupted_one_does(
    stage: Stage, whole: Callable[[str], list[Lines]], case: str
) -> None:
    changes, kills = CASES[case]
    document = saved(**changes)
    legs = [train(stage, document, f"{case}-killed", kill, WORKERS="1") for kill in [*kills, None]]
    assert [leg.statuses[kill.rank] for leg, kill in zip(legs, kills, strict=False)] == [
        -9 if kill.signal == "KILL" else AGAIN for kill in kills
    ], [leg.output[-2000:] for leg in legs]
    assert set(legs[-1].statuses) == {0}, legs[-1].output
    for rank, expected in enumerate(whole(case)):
        assert set(expected) == WHOLE
        assert lines(stage.path / f"{case}-killed", rank) == expected


def test_a_stopped_run_ends_without_an_error_and_is_not_done(stage: Stage) -> None:
    leg = train(stage, saved(), "stopped", Kill("step", 5, "USR1"))
    assert leg.statuses == [AGAIN]
    told = [line for line in leg.output.splitlines() if line.startswith("ftgen: ")]
    assert told[-1] == f"ftgen: stopped after step 5 of {STEPS}: exit code 85, to be run again"
    assert "Traceback" not in leg.output
    assert "after training is done" not in leg.output


def test_training_is_the_same_without_validation_and_without_saving(
    stage: Stage, whole: Callable[[str], list[Lines]]
) -> None:
    """With dropout: a validation that uses up a random number changes every loss after it."""
    document = saved(**LORA, validation=None, save=None)
    assert train(stage, document, "plain").statuses == [0]
    (validated,) = whole("packed-lora-dropout")
    assert lines(stage.path / "plain") == {key: line for key, line in validated.items() if key[0] == "step"}


def test_another_plan_is_refused_and_a_complete_run_trains_nothing(
    stage: Stage, whole: Callable[[str], list[Lines]]
) -> None:
    whole("sft")
    leg = train(stage, saved(global_batch_size=2), "sft-whole")
    assert leg.statuses == [1]
    assert "was saved by another plan: " in leg.output
    assert "global_batch_size is 4 there and 2 here" in leg.output
    leg = train(stage, saved(), "sft-whole")
    assert leg.statuses == [0]
    assert "ftgen: the run is complete: its last step is saved" in leg.output.splitlines()
    assert losses(leg.output) == []


def test_the_curves_of_a_resumed_run_go_on(stage: Stage) -> None:
    """Of TensorBoard: steps that were made twice count once. Weights & Biases writes files, because it is offline."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = {"tensorboard": True, "wandb": {"project": "facts"}}
    document = saved(log=log)
    key, nowhere = "f" * 40, "http://127.0.0.1:9"
    for kill, status in ((Kill("step", 5), -9), (None, 0)):
        leg = train(stage, document, "tracked", kill, WANDB_API_KEY=key, WANDB_BASE_URL=nowhere)
        assert leg.statuses == [status], leg.output
    assert "ftgen: Weights & Biases: offline, because 127.0.0.1 cannot be reached: wandb sync " in leg.output
    folder = stage.path / "tracked" / "trackers"
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    recorded = lines(stage.path / "tracked")
    expected = [(step - 1, line["loss"], line["rate"]) for (kind, step), line in sorted(recorded.items()) if kind == "step"]
    found = [(event.step, event.value) for event in events.Scalars("reduced_train_loss")]
    assert found == pytest.approx([(step, loss) for step, loss, _ in expected])
    assert [event.value for event in events.Scalars("lr")] == pytest.approx([rate for _, _, rate in expected])
    assert [event.step for event in events.Scalars("val_loss")] == [3, 7, 11]
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert files[1].stat().st_size > 1000  # the first attempt was killed before it wrote anything
    assert not [path for path in stage.path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
