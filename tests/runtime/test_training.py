"""Real NeMo and Megatron-Core on the CPU: a conversion that is killed again and again, and trainings of its result."""

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from stages import Stage, plan

from runtime.engines.nemo.convert import source
from runtime.guard import manifest
from runtime.weights import random_llama

pytestmark = pytest.mark.runtime


class Killed(NamedTuple):
    """What a SIGKILL left."""

    moment: str
    was_running: bool
    place_exists: bool
    status_of_converted: int


class History(NamedTuple):
    """A stage with a converted checkpoint, and how it came to be."""

    stage: Stage
    killed: list[Killed]
    last_output: str


def staging(stage: Stage, pattern: str) -> Callable[[], bool]:
    return lambda: bool(list(stage.place.parent.glob(f".{stage.place.name}.staging-*/{pattern}")))


def kill_when(stage: Stage, moment: str, reached: Callable[[], bool]) -> Killed:
    process = stage.start(plan(), "convert")
    while process.poll() is None and not reached():
        time.sleep(0.002)
    was_running = process.poll() is None
    process.kill()
    process.communicate(timeout=20)  # until all that hold its output are gone: its forked children too
    return Killed(moment, was_running, stage.place.exists(), stage.run(plan(), "converted")[0])


@pytest.fixture(scope="session")
def history(make_stage: Callable[[], Stage]) -> History:
    stage = make_stage()
    killed = [
        kill_when(stage, "claimed", (stage.place.parent / f".{stage.place.name}.claims" / "1").exists),
        kill_when(stage, "making weights", staging(stage, "from/config.json")),
        kill_when(stage, "converting", staging(stage, "tokenizer")),
        kill_when(stage, "saving weights", staging(stage, "weights/*.distcp")),
    ]
    status, output = stage.run(plan(), "convert")
    assert status == 0, output
    return History(stage, killed, output)


class Trained(NamedTuple):
    status: int
    output: str
    losses: list[float]


def train(stage: Stage, changes: dict[str, Any]) -> Trained:
    status, output = stage.run(plan(**changes), "finetune")
    return Trained(status, output, losses(output))


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^Training epoch .* reduced_train_loss: (\S+)", output, re.MULTILINE)]


@pytest.fixture(scope="session")
def sft(history: History) -> Trained:
    return train(history.stage, {})


def test_a_training_uses_none_of_the_packages_whose_import_is_deferred(sft: Trained) -> None:
    assert "deferred packages that were used: []" in sft.output.splitlines()


def test_a_killed_conversion_is_never_taken_for_a_finished_one(history: History) -> None:
    assert history.killed == [Killed(one.moment, True, False, 1) for one in history.killed]


def test_the_run_after_the_kills_finishes_and_clears_up(history: History) -> None:
    stage = history.stage
    assert manifest.flaw(stage.place, source(plan()), thorough=True) is None
    assert {path.name for path in stage.place.parent.iterdir()} == {stage.place.name, f".{stage.place.name}.claims"}
    assert {path.name for path in stage.place.iterdir()} == {"context", "weights", "hugging_face", "manifest.json"}
    assert "waiting for" not in history.last_output


def test_a_conversion_that_was_done_takes_no_time_and_imports_no_nemo(history: History) -> None:
    begin = time.monotonic()
    status, output = history.stage.run(plan(), "convert")
    assert time.monotonic() - begin < 3
    assert status == 0
    assert output.splitlines() == [f"ftgen: the converted checkpoint exists: {history.stage.place} (checked in 0.0 s)"]
    assert history.stage.run(plan(), "converted") == (0, "")


def test_the_converted_weights_are_those_of_the_hugging_face_checkpoint(history: History, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from torch.distributed import checkpoint

    random_llama.write(plan(), tmp_path)
    before: dict[str, torch.Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        before |= load_file(file)
    layers = [
        {key.partition(f"layers.{number}.")[2]: value for key, value in before.items() if f"layers.{number}." in key}
        for number in (0, 1)
    ]
    fc1 = [torch.cat([layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]]) for layer in layers]
    expected = {
        "module.embedding.word_embeddings.weight": before["model.embed_tokens.weight"],
        "module.output_layer.weight": before["lm_head.weight"],
        "module.decoder.final_layernorm.weight": before["model.norm.weight"],
        # Transformer Engine's names for the norms: what is converted without a GPU is trained on one.
        "module.decoder.layers.self_attention.linear_qkv.layer_norm_weight": stacked(layers, "input_layernorm.weight"),
        "module.decoder.layers.mlp.linear_fc1.layer_norm_weight": stacked(layers, "post_attention_layernorm.weight"),
        "module.decoder.layers.self_attention.linear_proj.weight": stacked(layers, "self_attn.o_proj.weight"),
        "module.decoder.layers.mlp.linear_fc1.weight": torch.stack(fc1),
        "module.decoder.layers.mlp.linear_fc2.weight": stacked(layers, "mlp.down_proj.weight"),
    }
    found = {key: torch.zeros_like(value) for key, value in expected.items()}
    checkpoint.load(found, checkpoint_id=history.stage.place / "weights", no_dist=True)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def stacked(layers: list[dict[str, Any]], key: str) -> Any:
    import torch

    return torch.stack([layer[key] for layer in layers])


def test_training_every_weight_lowers_the_loss(sft: Trained) -> None:
    assert sft.status == 0, sft.output
    assert len(sft.losses) == 25
    assert sum(sft.losses[-5:]) < sum(sft.losses[:5]) - 2.5
    assert "Training epoch 0, iteration 24/24 | lr: " in sft.output
    assert "train_step_timing in s: " in sft.output
    assert "`Trainer.fit` stopped: `max_steps=25` reached." in sft.output


def test_training_writes_only_where_it_may(sft: Trained, history: History) -> None:
    assert sft.status == 0
    names = {path.name for path in history.stage.path.iterdir() if not path.name.startswith("plan-")}
    assert names == {"HF_ckpt", "data", "run"}


def optimized(**changes: Any) -> dict[str, Any]:
    """A plan with what makes a step faster and does not need a GPU, which no spec may ask of a CPU."""
    document = plan(**changes)
    on = {
        "loss_tokens_only",
        "loss_tokens_in_last_layer",
        "scale_small_tensor" if changes.get("scheme") == "lora" else "fused_wgrad_accumulation",
    }
    return document | {"optimizations": {name: name in on for name in document["optimizations"]}}


def test_the_loss_is_the_same_where_it_is_worked_out_for_the_tokens_that_have_one(history: History, sft: Trained) -> None:
    status, output = history.stage.run(optimized(), "finetune")
    assert status == 0, output
    assert "ftgen: optimizations: loss_tokens_only, loss_tokens_in_last_layer, fused_wgrad_accumulation" in output
    assert losses(output) == pytest.approx(sft.losses, rel=1e-3)


def test_adapters_learn_the_same_where_the_small_tensor_is_scaled(history: History) -> None:
    changes = {"scheme": "lora", "max_steps": 4, "optimizer": {"learning_rate": 5e-2, "warmup_steps": 1}}
    stock = train(history.stage, changes)
    status, output = history.stage.run(optimized(**changes), "finetune")
    assert status == 0, output
    assert losses(output) == pytest.approx(stock.losses, rel=1e-3)
    assert stock.losses[-1] < stock.losses[0] - 0.05  # the adapters did something


def test_adapters_begin_at_the_same_loss_and_train(history: History, sft: Trained) -> None:
    lora = train(history.stage, {"scheme": "lora", "max_steps": 4, "lora": {"rank": 4, "targets": ["linear_qkv"]}})
    assert lora.status == 0, lora.output
    assert lora.losses[0] == pytest.approx(sft.losses[0], abs=2e-3)
    assert len(set(lora.losses)) == 4
    # A of 4 x 128 and B of 256 x 4 in each of two layers
    assert "3.1 K     Trainable params" in lora.output


def test_two_ranks_share_the_batch_of_one(history: History, sft: Trained) -> None:
    both = plan(gpus=2, gpus_per_node=2)
    ranks = [
        history.stage.start(
            both, "finetune", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", NODE_RANK="0", MASTER_PORT="29507"
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert losses(outputs[0])[:3] == pytest.approx(sft.losses[:3], abs=5e-3)
    assert losses(outputs[1]) == []


def test_a_users_file_is_trained_on(history: History) -> None:
    (history.stage.path / "mine.jsonl").write_text('{"input": "one and two", "output": "three"}\n' * 40)
    own = train(
        history.stage,
        {"data": {"kind": "jsonl", "path": "mine.jsonl"}, "max_steps": 8, "optimizer": {"learning_rate": 1e-2}},
    )
    assert own.status == 0, own.output
    assert own.losses[-1] < own.losses[0] - 1  # one sentence, forty times


def test_a_changed_weight_is_found(history: History, make_stage: Callable[[], Stage]) -> None:
    stage = make_stage()
    shutil.copytree(history.stage.home, stage.home)
    weights = stage.place / "weights" / "__0_0.distcp"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    status, output = stage.run(plan(), "verify")
    assert status == 1
    assert "__0_0.distcp has changed since it was built" in output
    assert history.stage.run(plan(), "verify")[0] == 0
