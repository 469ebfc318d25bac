"""The checkpoints of a run, without NeMo: what is published is complete, and a damaged one never hides an older one."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from stages import Stage, plan

from runtime.guard import checkpoints
from runtime.job.errors import JobError

SAVED = {"save": {"every_steps": 5, "keep": 2}}
ABOUT = checkpoints.about(plan(**SAVED), ["synthetic-1"], {"torch": "2"})


def write(folder: Path, step: int, generation: int = 1) -> Path:
    staged = checkpoints.staging(folder, step, generation)
    (staged / "weights").mkdir(parents=True)
    (staged / "weights" / "__0_0.distcp").write_bytes(os.urandom(1000))
    (staged / "weights" / "common.pt").write_bytes(b"common")
    assert checkpoints.publish_step(folder, step, generation, ABOUT) == 1006
    return folder / f"step_{step}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 5 and 10."""
    folder = tmp_path / "checkpoints"
    checkpoints.own(folder)
    write(folder, 5)
    write(folder, 10)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def truncate(path: Path) -> None:
    os.truncate(path / "weights" / "__0_0.distcp", 500)


def lose(path: Path) -> None:
    (path / "weights" / "common.pt").unlink()


def half_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 300)


def no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def of_another_step(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step_5"), path)


@pytest.mark.parametrize(
    ("damage", "flaw"),
    [
        (truncate, "weights/__0_0.distcp has 500 bytes, not 1000"),
        (lose, "common.pt is missing"),
        (half_manifest, "manifest.json cannot be read"),
        (no_manifest, "manifest.json is missing"),
        (of_another_step, "manifest.json has another format"),
    ],
)
def test_a_damaged_newest_checkpoint_does_not_hide_the_one_before(folder: Path, damage: Any, flaw: str, capsys) -> None:
    damage(folder / "step_10")
    found = checkpoints.newest(folder)
    assert found is not None
    assert (found.path, found.step) == (folder / "step_5", 5)
    (folder / ".claims" / "1" / "released").touch()
    checkpoints.clear(folder, checkpoints.own(folder))
    aside = names(folder) - {"step_5", ".claims"}
    assert len(aside) == 1
    assert aside.pop().startswith("step_10.untrusted-")
    assert flaw in capsys.readouterr().out
    assert write(folder, 10, generation=2) == folder / "step_10"  # its name is free


def test_the_last_ones_are_kept_and_what_is_half_made_is_removed(folder: Path) -> None:
    write(folder, 15)
    (folder / ".step_20.staging-1" / "weights").mkdir(parents=True)
    (folder / ".step_2.trash").mkdir()
    checkpoints.keep_newest(folder, 2)
    assert names(folder) == {"step_10", "step_15", ".claims", ".step_20.staging-1", ".step_2.trash"}
    (folder / ".claims" / "1" / "released").touch()
    checkpoints.clear(folder, checkpoints.own(folder))
    assert names(folder) == {"step_10", "step_15", ".claims"}


def test_the_newest_checkpoint_is_that_of_the_highest_step_and_not_of_the_last_name(folder: Path) -> None:
    write(folder, 100)
    found = checkpoints.newest(folder)
    assert found is not None
    assert found.step == 100


def test_a_job_that_was_taken_for_dead_publishes_nothing(folder: Path) -> None:
    (folder / ".claims" / "2").mkdir()
    with pytest.raises(JobError, match="another job has taken over the run"):
        write(folder, 15)
    assert "step_15" not in names(folder)


OWNER = "import sys, time; from pathlib import Path; from runtime.guard import checkpoints\n"
OWNER += "checkpoints.own(Path(sys.argv[1])); print('mine', flush=True); time.sleep(60)"


def owner(folder: Path, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, folder],
        env=os.environ | environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    return process


def test_a_living_job_keeps_its_run_and_a_dead_one_loses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTGEN_STALE_S", "1")
    first = owner(tmp_path, FTGEN_STALE_S="1", FTGEN_HOST="elsewhere")  # only its heartbeat shows that it lives
    with pytest.raises(JobError, match=rf"process {first.pid} on elsewhere, user \S+, trains the run of"):
        checkpoints.own(tmp_path)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    begin = time.monotonic()
    assert checkpoints.own(tmp_path).generation == 2
    assert time.monotonic() - begin < 5


def test_a_requeued_job_takes_over_from_itself_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = owner(tmp_path, FTGEN_HOST="elsewhere", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    begin = time.monotonic()
    assert checkpoints.own(tmp_path).generation == 2
    assert time.monotonic() - begin < 5
    first.kill()
    first.communicate()


def test_a_plan_that_trains_something_else_is_refused_with_what_differs(folder: Path) -> None:
    found = checkpoints.newest(folder)
    assert found is not None
    checkpoints.refuse_other(found, plan(**SAVED))
    for changes, difference in (
        ({"max_steps": 50}, "max_steps is 25 there and 50 here (max_steps changes the learning rate of every step)"),
        ({"seed": 2}, "seed is 1234 there and 2 here"),
        ({"optimizer": {"learning_rate": 1e-3}}, "optimizer.learning_rate is 0.002 there and 0.001 here"),
        ({"data": {"kind": "synthetic", "examples": 300}}, "data.examples is 200 there and 300 here"),
        ({"validation": {"every_steps": 5}, "global_batch_size": 2}, "global_batch_size is 4 there and 2 here"),
    ):
        with pytest.raises(JobError) as caught:
            checkpoints.refuse_other(found, plan(**SAVED | changes))
        assert difference in caught.value.what


@pytest.mark.parametrize(
    "changes",
    [
        {"save": {"every_steps": 7, "keep": 3}},
        {"walltime": "01:00:00", "window": {"last_steps": 5}, "environment": {"NCCL_DEBUG": "INFO"}},
        {"profile": {"tool": "pytorch", "first_step": 1, "last_step": 2}},
    ],
)
def test_a_plan_that_only_runs_in_another_way_goes_on(folder: Path, changes: dict[str, Any]) -> None:
    found = checkpoints.newest(folder)
    assert found is not None
    checkpoints.refuse_other(found, plan(**SAVED | changes))
    assert checkpoints.digest(plan(**SAVED | changes)) == found.manifest["plan_sha256"]


# --- check


def test_check_wants_room_for_one_checkpoint_more_than_are_kept(stage: Stage) -> None:
    saved = plan(save={"every_steps": 5, "keep": 3})
    saved["save"]["checkpoint_bytes"] = 1 << 50
    status, output = stage.run(saved, "check")
    assert status == 1
    assert "room for 4 checkpoints (save.keep + 1) needs 4194304.0 GiB in" in output
    checkpoint = stage.path / "run" / "checkpoints" / "step_5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").touch()
    os.truncate(checkpoint / "weights", 1 << 42)  # a hole: what is there already needs no more room
    assert "needs 4190208.0 GiB in" in stage.run(saved, "check")[1]
    assert stage.run(plan(**SAVED), "check")[0] == 0


# --- the held-out examples


def example(number: int) -> str:
    return json.dumps({"input": f"question {number}", "output": f"answer {number}"}) + "\n"


def parts(folder: Path) -> list[list[str]]:
    return [(folder / f"{name}.jsonl").read_text().splitlines(keepends=True) for name in ("training", "validation")]


@pytest.fixture
def split_data(tmp_path: Path) -> Path:
    """100 examples, as the data kinds split them."""
    (tmp_path / "training.jsonl").write_text("".join(example(number) for number in range(95)))
    (tmp_path / "validation.jsonl").write_text("".join(example(number) for number in range(95, 100)))
    return tmp_path


def test_a_fraction_is_held_out_and_no_example_is_lost(split_data: Path) -> None:
    from runtime.data import held_out

    before = [*itertools.chain(*parts(split_data))]
    held_out.apply(plan(validation={"fraction": 0.2}), split_data)
    training, validation = parts(split_data)
    assert (len(training), len(validation)) == (80, 20)
    assert sorted(training + validation) == sorted(before)


def test_the_default_fraction_keeps_the_data_of_a_run_without_validation() -> None:
    from runtime.data import prepare

    assert prepare.identity(plan(validation={})) == prepare.identity(plan())
    assert prepare.identity(plan(validation={"fraction": 0.2})) != prepare.identity(plan())


def test_a_file_is_held_out_and_all_the_data_is_trained_on(split_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.data import held_out

    monkeypatch.setenv("STAGE_PATH", str(split_data))
    (split_data / "mine.jsonl").write_text("".join(example(number) for number in range(500, 510)))
    before = [*itertools.chain(*parts(split_data))]
    held_out.apply(plan(validation={"file": "mine.jsonl"}), split_data)
    training, validation = parts(split_data)
    assert training == before
    found = [json.loads(line) for line in validation]
    assert found == [json.loads(example(number)) | {"line": number - 499} for number in range(500, 510)]


def test_too_few_held_out_examples_are_refused_before_the_training(stage: Stage) -> None:
    (stage.path / "held_out.jsonl").write_text("".join(example(number) for number in range(3)))
    (stage.path / "data.jsonl").write_text("".join(example(number) for number in range(30)))
    data = {"data": {"kind": "jsonl", "path": "data.jsonl"}}
    for asked, found, hint in (
        ({"file": "held_out.jsonl"}, 3, "add examples to validation.file"),
        ({"fraction": 0.05}, 2, "increase validation.fraction"),
    ):
        status, output = stage.run(plan(**data, validation=asked), "check")
        assert status == 1
        assert f"ftgen: error: validation: the held-out data has {found} examples, but a global batch has 4\n" in output
        assert f"  hint: {hint}, or reduce global_batch_size" in output
    assert stage.run(plan(**data, validation={"fraction": 0.2}), "check")[0] == 0
    missing = stage.run(plan(validation={"file": "none.jsonl"}), "check")[1]
    assert "validation.file: the file" in missing
