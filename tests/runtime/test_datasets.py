"""Datasets of the Hugging Face hub and of a disk, read with the package `datasets`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import small_hub
from chats import said, template
from stages import Stage, plan

from runtime.data import prepare
from runtime.job.errors import JobError

pytestmark = pytest.mark.runtime
PAIRS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(20)]
CHATS = [said(f"user: question {number}", f"assistant: answer {number}") for number in range(20)]
FromValue = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"}] * 4
Fetch = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetch:
    """Reads the dataset at `path`; returns the examples."""
    monkeypatch.setenv("STAGE_PATH", str(tmp_path))

    def read(path: str, **data: Any) -> list[dict[str, Any]]:
        folder = prepare.fetch(plan(data={"kind": "hf", "path": path, **data}))
        files = [folder / f"{split}.jsonl" for split in ("training", "validation")]
        assert {path.name for path in folder.iterdir()} == {"manifest.json", *(path.name for path in files)}
        examples = [json.loads(line) for path in files for line in path.read_text().splitlines()]
        return sorted(examples, key=lambda example: int(example["line"]))

    return read


def pairs(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [{"input": row["prompt"], "output": row["completion"], "line": number} for number, row in enumerate(rows)]


def save(rows: list[dict[str, Any]], path: Path, how: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    if how == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif how == "parquet":
        table.to_parquet(path)
    elif how == "disk":
        table.save_to_disk(path)
    elif how == "disk with splits":
        datasets.DatasetDict({"train": table, "test": table.select(range(2))}).save_to_disk(path)


FORMS = {
    "one file of JSON lines": ("mine.jsonl", "mine.jsonl", "jsonl"),
    "one parquet file": ("mine.parquet", "mine.parquet", "parquet"),
    "a folder of parquet": ("mine", "mine/data/train-00000-of-00001.parquet", "parquet"),
    "a folder of JSON lines": ("mine", "mine/train.jsonl", "jsonl"),
    "saved to disk": ("mine", "mine", "disk"),
    "saved to disk with splits": ("mine", "mine", "disk with splits"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_dataset_on_a_disk_is_read(form: str, fetch: Fetch, tmp_path: Path) -> None:
    path, file, how = FORMS[form]
    save(PAIRS, tmp_path / file, how)
    assert fetch(path) == pairs(PAIRS)


def test_a_split_is_chosen(fetch: Fetch, tmp_path: Path) -> None:
    save(PAIRS, tmp_path / "mine", "disk with splits")
    assert fetch("mine", split="test") == pairs(PAIRS[:2])
    save(PAIRS[:5], tmp_path / "folder/train.jsonl", "jsonl")
    save(PAIRS[5:9], tmp_path / "folder/test.jsonl", "jsonl")
    assert fetch("folder", split="test") == pairs(PAIRS[5:9])


def test_messages_are_conversations(fetch: Fetch, tmp_path: Path) -> None:
    rows = [{"messages": chat["messages"], "source": "x"} for chat in CHATS]
    rows[3]["messages"] = [*CHATS[3]["messages"], {"role": "assistant", "content": "more", "name": "n"}]
    save(rows, tmp_path / "mine.parquet", "parquet")  # all messages have a `name` then, most of them null
    found = fetch("mine.parquet")
    assert found[0] == {**CHATS[0], "line": 0}
    assert found[3]["messages"][2] == {"role": "assistant", "content": "more", "name": "n"}


def test_from_and_value_with_a_system_column_are_conversations(fetch: Fetch, tmp_path: Path) -> None:
    save(FromValue, tmp_path / "mine", "disk")
    assert fetch("mine")[0]["messages"] == said("system: c", "user: a", "assistant: b")["messages"]


def test_columns_are_chosen_by_name(fetch: Fetch, tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "answer": row["completion"], "prompt": "-"} for row in PAIRS]
    save(rows, tmp_path / "mine.parquet", "parquet")
    assert fetch("mine.parquet", columns={"prompt": "question", "completion": "answer"}) == pairs(PAIRS)


WRONG = {
    "no such folder": ({"path": "none"}, "data.path: .*none does not exist"),
    "a file of another kind": ({"path": "plan.txt"}, "is no file of a dataset"),
    "no such split": ({"path": "saved", "split": "dev"}, r"saved \(dev\): no split 'dev'"),
    "no such split in a folder": (
        {"path": "folder", "split": "dev"},
        r"folder \(dev\): .*dev.*\n  hint: correct data.config",
    ),
    "no such column": (
        {"path": "saved", "columns": {"messages": "chat"}},
        r"has no column chat\n  hint: its columns are prompt, completion",
    ),
    "no known column": ({"path": "texts"}, "has neither messages nor prompt and completion, but the columns text"),
    "faulty rows": ({"path": "faulty"}, r"faulty \(train\) row 1: the completion has no text; .*row 2: the prompt has no"),
    "one row": ({"path": "one"}, "has 1 examples, but at least 2 are needed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(case: str, fetch: Fetch, tmp_path: Path) -> None:
    save(PAIRS, tmp_path / "saved", "disk with splits")
    save(PAIRS, tmp_path / "folder/train.jsonl", "jsonl")
    save([{"text": "a"}] * 3, tmp_path / "texts", "disk")
    save([PAIRS[0], {"prompt": "a", "completion": " "}, {"prompt": None, "completion": "b"}], tmp_path / "faulty", "disk")
    save(PAIRS[:1], tmp_path / "one", "disk")
    (tmp_path / "plan.txt").touch()
    data, text = WRONG[case]
    with pytest.raises(JobError, match=text):
        fetch(**data)


def test_other_content_of_a_folder_is_other_data(fetch: Fetch, tmp_path: Path) -> None:
    save(PAIRS, tmp_path / "mine/train.jsonl", "jsonl")
    assert len(fetch("mine")) == 20
    save(PAIRS[:7], tmp_path / "mine/train.jsonl", "jsonl")
    assert len(fetch("mine")) == 7


ON_THE_HUB = {"kind": "hf", "dataset": small_hub.NAME, "revision": small_hub.COMMIT}


def hub_plan(**changes: Any) -> dict[str, Any]:
    document = plan(seq_length=512, data=ON_THE_HUB | changes)
    document["data"]["chat_template"] = template("llama3")
    return document


def test_a_dataset_of_the_hub_is_downloaded_once_at_its_commit(stage: Stage, tmp_path: Path) -> None:
    save(CHATS, tmp_path / "hub/data/train-00000-of-00001.parquet", "parquet")
    with small_hub.serving(tmp_path / "hub") as (address, asked):
        status, output = stage.run(hub_plan(), "data", HF_ENDPOINT=address)
    assert status == 0, output
    assert "hf data ftgen/facts" in output
    assert "{+answer " in output
    assert any(path.endswith(".parquet") and small_hub.COMMIT in path for path in asked)
    assert not [path for path in asked if "resolve" in path and small_hub.COMMIT not in path]
    # a job on a node without network finds it
    status, output = stage.run(hub_plan(), "data", HF_HUB_OFFLINE="1")
    assert status == 0, output
    assert "preparing the data" not in output


def test_configurations_that_the_readme_names_are_read(stage: Stage, tmp_path: Path) -> None:
    save(CHATS[:5], tmp_path / "hub/one/a.parquet", "parquet")
    save(CHATS, tmp_path / "hub/two/b.parquet", "parquet")
    (tmp_path / "hub/README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one/*.parquet\n"
        "- config_name: two\n  data_files: two/*.parquet\n---\n"
    )
    (tmp_path / "hub/code.py").write_text("raise SystemExit('this code was run')\n")
    with small_hub.serving(tmp_path / "hub") as (address, asked):
        status, output = stage.run(hub_plan(config="two"), "data", HF_ENDPOINT=address)
        assert status == 0, output
        assert re.search(r"^examples +19 +1$", output, re.MULTILINE)
        status, output = stage.run(hub_plan(config="three"), "data", HF_ENDPOINT=address)
    assert status == 1
    assert "ftgen: error: ftgen/facts (train): BuilderConfig 'three' not found. Available: ['one', 'two']" in output
    assert not [path for path in asked if path.endswith(".py")]


def test_a_dataset_that_is_not_on_the_hub_or_cannot_be_reached_is_one_line(stage: Stage, tmp_path: Path) -> None:
    with small_hub.serving(tmp_path) as (address, _):
        status, output = stage.run(hub_plan(dataset="ftgen/none"), "data", HF_ENDPOINT=address)
        other = stage.run(hub_plan(revision="b" * 40), "data", HF_ENDPOINT=address)
    assert status == 1
    assert "ftgen: error: ftgen/none is not on the hub, or this token has no access to it (404)" in output
    assert "hint: look at https://huggingface.co/datasets/ftgen/none" in output
    assert f"ftgen: error: ftgen/facts has no revision '{'b' * 40}'" in other[1]
    unreachable = {
        "HF_HUB_OFFLINE is set, and ftgen/facts at": {"HF_HUB_OFFLINE": "1"},
        "cannot be downloaded: 127.0.0.1:9 refuses the connection": {"HF_ENDPOINT": "http://127.0.0.1:9"},
    }
    for reason, environment in unreachable.items():
        status, output = stage.run(hub_plan(), "data", **environment)
        assert status == 1
        assert reason in output
        assert "hint: where there is a network: bash tiny.sh --download" in output
        assert "Traceback" not in output
