"""Megatron-Bridge on the CPU, on the user's data: what ftgen tokenizes, packs and orders is trained as with NeMo."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from bridge import bridge_plan, bridge_stage, losses, train
from chats import CHANGES, FACTS, epochs, first_loss, write_base_and_chats
from stages import Stage, plan

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def stage(make_stage: Callable[[], Stage]) -> Stage:
    stage = bridge_stage(make_stage())
    write_base_and_chats(stage.path)
    status, output = stage.run(bridge_plan(**CHANGES), "convert")
    assert status == 0, output
    return stage


def test_the_loss_is_that_of_the_masked_tokens(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    document = bridge_plan(**CHANGES, **epochs(3))
    run = train(stage, document)
    monkeypatch.setenv("STAGE_PATH", str(stage.path))
    monkeypatch.setenv("NEMO_HOME", str(stage.home))
    assert run.losses[0] == pytest.approx(first_loss(document, stage.path), rel=1e-5)
    assert "ftgen: 3 epochs of 20 examples are 15 steps of 4 examples" in run.output
    assert len(run.losses) == 15
    assert run.losses[-1] < run.losses[0] - 1  # three conversations, seven times each


@pytest.mark.parametrize("packed", [False, True], ids=["examples", "packs"])
def test_both_engines_learn_the_same_from_conversations(packed: bool, stage: Stage) -> None:
    """Some conversations have two answers, and end with the token that ends each answer: Llama-3's <|eot_id|>."""
    with_nemo, nemo = plan(**CHANGES, max_steps=6, global_batch_size=2), Stage(stage.path)
    with_nemo["data"]["packed"] = packed
    assert nemo.run(with_nemo, "convert")[0] == 0
    mine = train(stage, bridge_plan(**CHANGES, max_steps=6, global_batch_size=2, packed=packed))
    status, output = nemo.run(with_nemo, "finetune")
    assert status == 0, output
    assert [float(f"{loss:.4g}") for loss in mine.losses] == pytest.approx(losses(output), abs=1.1e-3)
    assert mine.losses[-1] < mine.losses[0] - 0.5
    assert len(list(stage.path.glob("data/chat-[0-9a-f]*"))) == 1  # both engines trained on one folder of examples


def test_the_log_says_what_was_dropped(stage: Stage) -> None:
    long: dict[str, Any] = {"messages": [FACTS[0]["messages"][1], {"role": "assistant", "content": "Paris. " * 200}]}
    (stage.path / "long.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in [*FACTS * 7, long, long]))
    changes = CHANGES | {"data": {"kind": "chat", "path": "long.jsonl", "too_long": "drop"}, "max_steps": 2}
    run = train(stage, bridge_plan(**changes))
    assert re.search(r"^ftgen: warning: .* 2 are dropped|^ftgen: warning: .* 1 are dropped", run.output, re.MULTILINE)
    status, output = stage.run(bridge_plan(**changes | {"data": {"kind": "chat", "path": "long.jsonl"}}), "finetune")
    assert status == 1
    assert "ftgen: error: 2 of 23 examples have more than 256 tokens, which is seq_length" in output
    assert "Traceback" not in output


def test_a_dataset_in_parquet_is_trained_on(stage: Stage) -> None:
    import pyarrow
    from pyarrow import parquet

    (stage.path / "rows").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(FACTS * 7), stage.path / "rows" / "train.parquet")
    run = train(stage, bridge_plan(**CHANGES | {"data": {"kind": "hf", "path": "rows"}, "max_steps": 2}, packed=True))
    (line,) = re.findall(r"^ftgen data: (.*)$", run.output, re.MULTILINE)
    assert json.loads(line)["training"]["examples"] == 20
    assert len(run.losses) == 2
