"""The peers of bench/peers do the same work as ftgen: on the CPU, from the same weights, they compute what NeMo computes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from stages import Stage, plan

from runtime.weights import random_llama

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "bench" / "peers"
WITH_PEERS = ROOT / ".venv-sets" / "peers" / "bin" / "python"  # make sets
CLOSE = 3e-6  # float32, sums in another order; seen: 6.4e-7
FP8 = 0.01  # torchao's float8, emulated, in the frozen layers; seen: 0.0048
pytestmark = pytest.mark.runtime


class Work(NamedTuple):
    """A stage with a trained LoRA, its plan, and what NeMo computed."""

    stage: Stage
    plan: dict[str, Any]
    nemo: dict[str, Any]


@pytest.fixture(scope="module")
def work(make_stage: Callable[[], Stage]) -> Work:
    """Six steps of packs. A spec cannot have them on a CPU, where NeMo's attention needs the stand-in of ftgen's runtime."""
    stage = make_stage()
    optimizer = {"learning_rate": 1e-2, "warmup_steps": 2}
    document = plan(scheme="lora", seq_length=256, max_steps=6, optimizer=optimizer)
    document["data"]["packed"] = True
    assert stage.run(document, "convert")[0] == 0
    recorder = Stage(stage.path, job=Path(__file__).with_name("peer_recorder.py"))
    status, output = recorder.run(document, "finetune", RECORD=str(stage.path / "record.npz"))
    assert status == 0, output
    random_llama.write(document, stage.path / "hf")  # what the converted checkpoint was made of
    return Work(stage, document, dict(np.load(stage.path / "record.npz")))


@pytest.fixture(scope="module")
def one() -> ModuleType:
    sys.path.insert(0, str(PEERS))
    import one

    return one


def by_its_program(work: Work, peer: str) -> dict[str, Any]:
    file, out = work.stage.path / "plan.json", work.stage.path / f"{peer}.json"
    file.write_text(json.dumps(work.plan))
    start = ["--weights", work.stage.path / "hf", "--adapters", work.stage.path / "record.npz"]
    own = {"STAGE_PATH": work.stage.path, "NEMO_HOME": work.stage.home, "FTGEN_RUN_DIR": work.stage.path / "run"}
    environment = os.environ | {name: str(value) for name, value in own.items()}
    command = [WITH_PEERS, PEERS / "one.py", file, peer, out, *start]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Training epoch 0, iteration 5/5 | lr: 0.001464 | global_batch_size: 4 | global_step: 5 | " in done.stdout
    return dict(json.loads(out.read_text()))


@pytest.mark.parametrize(("peer", "tolerance"), [("hf", CLOSE), ("torchtune", CLOSE), ("hf-fp8", FP8)])
def test_a_peer_computes_the_losses_of_nemo(work: Work, peer: str, tolerance: float) -> None:
    found, nemo = by_its_program(work, peer), work.nemo
    assert [sha for step in found["batches"] for sha in step] == list(nemo["batches"])
    assert found["loss_tokens"] == nemo["loss_tokens"].reshape(6, 4).sum(1).tolist()
    assert found["trainable_parameters"] == nemo["trained"]
    assert found["losses"] == pytest.approx(nemo["losses"], abs=tolerance)  # so also the gradients and the optimizer's steps
    assert max(found["losses"]) - min(found["losses"]) > 0.1  # which would not show in losses that hardly move
    assert found["changed_by_another_example"] == 0


def test_so_does_one_whose_attention_has_a_mask(work: Work, one: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = on_the_stage(work, one, monkeypatch)
    peer = peer_of(work, one, work.stage.path / "record.npz", "hf-sdpa")
    assert one.refuse_a_leak(peer, batches[0], work.plan["model"]["vocab_size"]) == 0
    assert one.train(peer, work.plan, batches)["losses"] == pytest.approx(work.nemo["losses"], abs=CLOSE)


def test_the_adapters_matter_from_the_first_step(work: Work, one: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them the first loss is another, so the test above compares them too."""
    batches = on_the_stage(work, one, monkeypatch)
    with_zeros = peer_of(work, one, adapters=None)
    losses = [float(with_zeros.loss(batch).detach()) * batch.loss_tokens for batch in batches[:4]]
    first = sum(losses) / sum(batch.loss_tokens for batch in batches[:4])
    assert abs(first - work.nemo["losses"][0]) > 100 * CLOSE


def test_a_peer_whose_tokens_see_other_examples_is_refused(
    work: Work, one: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = on_the_stage(work, one, monkeypatch)[0]
    peer = peer_of(work, one, work.stage.path / "record.npz")
    leaking = batch._replace(ends=batch.ends[[0, -1]])
    monkeypatch.setattr(peer, "hidden", lambda given, hidden=peer.hidden: hidden(given._replace(ends=leaking.ends)))
    with pytest.raises(SystemExit, match="tokens see other examples"):
        one.refuse_a_leak(peer, batch, work.plan["model"]["vocab_size"])


def on_the_stage(work: Work, one: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setenv("STAGE_PATH", str(work.stage.path))
    monkeypatch.setenv("NEMO_HOME", str(work.stage.home))
    return list(one.work.batches(work.plan, "cpu"))


def peer_of(work: Work, one: ModuleType, adapters: Path | None, name: str = "hf") -> Any:
    options = one.argparse.Namespace(weights=work.stage.path / "hf", adapters=adapters)
    return one.build(name, work.plan, options, "cpu")


def test_the_learning_rates_are_nemos(work: Work, one: ModuleType) -> None:
    after = [one.work.rate(work.plan, step) for step in range(1, 7)]  # NeMo's scheduler has stepped when they are recorded
    assert after == pytest.approx(work.nemo["rates"], abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"scheme": "sft"}, 'scheme is not "lora"'), ({"lora": {"targets": ["linear_fc1"]}}, "lora.targets is not linear_qkv")],
)
def test_other_work_is_refused(one: ModuleType, changes: dict[str, Any], reason: str) -> None:
    document = plan(**({"scheme": "lora"} | changes))
    document["data"]["packed"] = True
    with pytest.raises(SystemExit, match=reason):
        one.work.refuse_other_work(document)


def test_a_peer_that_fails_is_recorded_with_its_error(tmp_path: Path) -> None:
    """A spec for a CPU has no packs, so the peer refuses the work."""
    spec = tmp_path / "tiny.toml"
    spec.write_text('scheme = "lora"\nprecision = "fp32"\ngpus = 1\ngpu = "cpu"\nmodel = "tiny_llama"\n')
    options = ["--gpu", "cpu", "--variants", "hf", "--steps", "30", "--stage", tmp_path / "stage", "--out", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, PEERS / "run.py", spec, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (result,) = (tmp_path / "out").glob("*-cpu-peers.json")
    (run,) = json.loads(result.read_text())["runs"]
    assert (run["variant"], run["status"], run["step_time_s"]) == ("hf", "failed", None)
    assert run["error"].endswith("peers: error: they do not know this work: the data is not packed by NeMo")
