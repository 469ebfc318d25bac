"""TensorBoard, Weights & Biases and MLflow get what the step lines say, with the real libraries; a missing one is named."""

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from stages import Stage, plan

pytestmark = pytest.mark.runtime
KEY = "f" * 40
WITH_MLFLOW = Path(__file__).parents[2] / ".venv-sets" / "mlflow" / "bin" / "python"
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


def test_a_resumed_run_is_one_run_of_mlflow(make_stage: Any) -> None:
    """In an environment with MLflow: `make sets` installs it. The second attempt begins after the save of step 4."""
    stage = Stage(make_stage().path, WITH_MLFLOW)
    document = tracked(mlflow={"experiment": "facts"})
    assert stage.run(document, "convert")[0] == 0
    status, output = stage.run(document, "finetune")
    assert status == 0, output
    trackers = stage.path / "run" / "trackers"
    assert f"ftgen: MLflow: mlflow ui --backend-store-uri sqlite:///{trackers}/mlflow.db" in output
    shutil.rmtree(stage.path / "run" / "checkpoints" / "step_8")
    status, again = stage.run(document, "finetune")
    assert status == 0, again
    assert "ftgen: resumed after step 4: " in again
    (losses,) = metrics(trackers, "reduced_train_loss")
    said = {step: float(loss) for step, loss in LOSS.findall(output)}
    assert losses == pytest.approx(said, rel=1e-3)
    assert len(losses) == 8


def test_without_a_key_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from runtime.engines import trackers

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


WRITE = """
import sys
from pathlib import Path
from runtime.engines.megatron_bridge.writers import Mlflow
first, end = int(sys.argv[2]), int(sys.argv[3])
writer = Mlflow(Path(sys.argv[1]), "facts")
for step in range(first, end):
    writer.log({"reduced_train_loss": 2.0 - step / 8}, step)
writer.close()
"""


def test_a_resumed_run_of_megatron_bridge_is_one_run_of_mlflow(tmp_path: Path) -> None:
    """Two attempts, in the environment with MLflow, which has no Megatron-Bridge: only its writer."""
    folder = tmp_path / "e_7" / "e" / "trackers"
    for first, end in ((0, 3), (3, 5)):
        command = [WITH_MLFLOW, "-c", WRITE, folder, str(first), str(end)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    assert metrics(folder, "reduced_train_loss") == [{str(step): 2.0 - step / 8 for step in range(5)}]


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    """The values of a metric by step, for each run of the experiment."""
    ask = "import json, mlflow, sys; client = mlflow.MlflowClient(sys.argv[1])"
    ask += "; runs = client.search_runs([client.get_experiment_by_name('facts').experiment_id])"
    ask += "; print(json.dumps([{str(m.step): m.value for m in client.get_metric_history(run.info.run_id, sys.argv[2])}"
    ask += " for run in runs]))"
    command = [WITH_MLFLOW, "-c", ask, f"sqlite:///{folder}/mlflow.db", name]
    return list(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
