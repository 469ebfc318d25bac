"""Real NeMo on the CPU, trained on conversations: the loss is that of the masked tokens, and epochs are real."""

import json
import re
from collections.abc import Callable

import pytest
from chats import CHANGES, FACTS, epochs, first_loss, template, write_base_and_chats
from stages import Stage, plan

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def stage(make_stage: Callable[[], Stage]) -> Stage:
    """A converted tiny Llama with the tokenizer and the chat template of an Instruct model, and a file of conversations."""
    stage = make_stage()
    write_base_and_chats(stage.path)
    status, output = stage.run(plan(**CHANGES), "convert")
    assert status == 0, output
    return stage


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^Training epoch .* reduced_train_loss: (\S+)", output, re.MULTILINE)]


def test_the_chat_template_survives_the_conversion(stage: Stage) -> None:
    found = stage.home.glob("models/directory/*/context/nemo_tokenizer/chat_template.jinja")
    assert [path.read_text() for path in found] == [template("llama3")]


def test_the_loss_is_that_of_the_masked_tokens(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    document = plan(**CHANGES, max_steps=3)
    status, output = stage.run(document, "finetune")
    assert status == 0, output
    monkeypatch.setenv("STAGE_PATH", str(stage.path))
    monkeypatch.setenv("NEMO_HOME", str(stage.home))
    assert losses(output)[0] == pytest.approx(first_loss(document, stage.path), rel=2e-4)  # the log has four digits


def test_epochs_are_as_many_steps_as_the_data_needs(stage: Stage) -> None:
    status, output = stage.run(plan(**CHANGES, **epochs(3)), "finetune")
    assert status == 0, output
    assert "ftgen: 3 epochs of 20 examples are 15 steps of 4 examples" in output
    assert re.search(r"^ftgen: training: sft_nemo_tiny_llama_fp32_1, 15 steps$", output, re.MULTILINE)
    assert len(losses(output)) == 15
    assert "Training epoch 0, iteration 14/14 | lr: " in output
    assert "`Trainer.fit` stopped: `max_steps=15` reached." in output
    assert losses(output)[-1] < losses(output)[0] - 1  # three conversations, seven times each


def test_the_log_says_what_the_data_is(stage: Stage) -> None:
    from hashlib import sha256

    status, output = stage.run(plan(**CHANGES, max_steps=2), "finetune")
    assert status == 0, output
    (line,) = re.findall(r"^ftgen data: (.*)$", output, re.MULTILINE)
    said = json.loads(line)
    assert (said["kind"], said["path"]) == ("chat", "chat.jsonl")
    assert said["sha256"] == sha256((stage.path / "chat.jsonl").read_bytes()).hexdigest()
    assert (said["training"]["examples"], said["validation"]["examples"]) == (20, 1)
    assert 0 < said["training"]["trained_tokens"] < said["training"]["tokens"]


def test_faulty_conversations_end_the_run_with_their_lines(stage: Stage) -> None:
    (stage.path / "bad.jsonl").write_text(json.dumps(FACTS[0]) + '\n{"messages": [{"role": "user", "content": "a"}]}\n')
    status, output = stage.run(plan(**CHANGES | {"data": {"kind": "chat", "path": "bad.jsonl"}}), "finetune")
    assert status == 1
    assert f"ftgen: error: {stage.path}/bad.jsonl:2: no message of the assistant has text" in output
    assert "Traceback" not in output


def test_adapters_learn_conversations_too(stage: Stage) -> None:
    lora = {"scheme": "lora", "optimizer": {"learning_rate": 5e-2, "warmup_steps": 1}}
    status, output = stage.run(plan(**CHANGES, **lora, **epochs(2)), "finetune")
    assert status == 0, output
    assert losses(output)[-1] < losses(output)[0] - 0.05


def test_two_ranks_share_an_epoch(stage: Stage) -> None:
    one = stage.run(plan(**CHANGES, **epochs(1)), "finetune")[1]
    both = plan(**CHANGES, **epochs(1), gpus=2, gpus_per_node=2)
    shared = {"WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_PORT": "29517"}
    ranks = [stage.start(both, "finetune", RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in (0, 1)]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert len(losses(outputs[0])) == len(losses(one)) == 5
    assert losses(outputs[0])[:3] == pytest.approx(losses(one)[:3], abs=2e-2)


def test_other_kinds_have_epochs_too(stage: Stage) -> None:
    changes = CHANGES | {"data": {"kind": "synthetic", "examples": 30}, "seq_length": 512}
    status, output = stage.run(plan(**changes, **epochs(1)), "finetune")
    assert status == 0, output
    assert "ftgen: 1 epoch of 28 examples are 7 steps of 4 examples" in output
    assert len(losses(output)) == 7
