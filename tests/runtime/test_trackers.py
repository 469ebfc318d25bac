"""TensorBoard and Weights & Biases get what the step lines say, with the real libraries; a missing one is named at once."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from stages import Stage, plan

pytestmark = pytest.mark.runtime
KEY = "f" * 40
LOSS = re.compile(r"global_step: (\d+) .*?reduced_train_loss: (\S+)")


def tracked(**log: Any) -> dict[str, Any]:
    return plan(max_steps=8, save={"every_steps": 4}, validation={"every_steps": 4}, log=log)


def test_trackers_have_the_losses_of_the_log_and_no_key_is_in_a_file(make_stage: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage = make_stage()
    document = tracked(tensorboard=True, wandb={"project": "facts"})
    assert stage.run(document, "convert")[0] == 0
    status, output = stage.run(document, "finetune", WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9")
    assert status == 0, output
    assert "ftgen: Weights & Biases: offline, because 127.0.0.1 cannot be reached: wandb sync " in output
    folder = stage.path / "run" / "trackers"
    assert f"ftgen: TensorBoard: tensorboard --logdir {folder / 'tensorboard'}" in output
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    said = {int(step): float(loss) for step, loss in LOSS.findall(output)}
    found = {event.step: event.value for event in events.Scalars("reduced_train_loss")}
    assert len(said) == 8
    assert found == pytest.approx(said, rel=1e-3)  # the log rounds them to four digits
    assert [event.step for event in events.Scalars("val_loss")]
    (run,) = (folder / "wandb").glob("offline-run-*")
    (file,) = run.glob("*.wandb")
    assert file.stat().st_size > 1000
    assert not [path for path in stage.path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_without_a_key_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from runtime.engines.nemo import trackers

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert trackers.offline() == "there is no WANDB_API_KEY"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert trackers.offline() == "WANDB_MODE is disabled"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert trackers.offline() == ""


def test_a_missing_library_is_an_error_in_the_check(stage: Stage) -> None:
    assert not find_spec("mlflow")  # if it is installed here, name another one
    status, output = stage.run(tracked(mlflow={"experiment": "facts"}), "check")
    assert status == 1
    assert "ftgen: error: log.mlflow: the package mlflow is not installed\n  hint: pip install mlflow for " in output


def test_trackers_do_not_change_what_is_trained() -> None:
    from runtime.guard import checkpoints

    assert checkpoints.digest(tracked(tensorboard=True)) == checkpoints.digest(
        plan(max_steps=8, validation={"every_steps": 4})
    )
    assert json.loads(json.dumps(tracked(tensorboard=True)))["log"]["tensorboard"] is True
