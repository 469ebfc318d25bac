"""`ftgen data` and the script's --data; and the quickstart on conversations, end to end."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chats import said, template, write_tokenizer
from stages import Stage, plan

from runtime import show_data
from runtime.data import store
from runtime.data.conversation import conversation
from runtime.data.tokenizer import Tokenizer, Tokens

pytestmark = pytest.mark.runtime
ROOT = Path(__file__).parents[2]
SPEC = ROOT / "specs" / "quickstart_chat.toml"
FACTS = ROOT / "specs" / "data" / "facts.jsonl"


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with the file of facts where the quickstart expects it."""
    (tmp_path / "specs" / "data").mkdir(parents=True)
    shutil.copy(FACTS, tmp_path / "specs" / "data")
    return tmp_path


def environment(desk: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(desk), "STAGE_PATH": str(desk), "PYTHONPATH": str(ROOT)}


def data(desk: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ftgen", "data", str(SPEC), *more]
    return subprocess.run(command, cwd=desk, env=environment(desk), capture_output=True, text=True, check=False, timeout=300)


def row(output: str, name: str) -> list[str]:
    (found,) = re.findall(rf"^{name} +(\S+) +(\S+)$", output, re.MULTILINE)
    return list(found)


def test_ftgen_data_shows_the_counts_and_an_example_without_a_gpu(desk: Path) -> None:
    done = data(desk)
    assert (done.returncode, done.stderr) == (0, "")
    documents = [json.loads(line) for line in FACTS.read_text().splitlines()]
    assert row(done.stdout, "examples") == [str(len(documents) - 1), "1"]
    assert row(done.stdout, "too long") == ["0", "0"]
    assert "20 epochs of 19 examples are 95 steps of 4 examples" in done.stdout
    assert done.stdout.rstrip().endswith("{+The capital of France is Paris.<|eot_id|>+}")
    assert "\x1b" not in done.stdout
    assert {path.name for path in desk.iterdir()} == {"data", "specs"}  # no run directory, and no code is left


def test_trained_tokens_are_those_of_the_answers(desk: Path) -> None:
    reader = Tokenizer(show_data.tokenizer(plan(), desk), template("llama3"))
    documents = [json.loads(line) for line in FACTS.read_text().splitlines()]
    by_hand = sum(
        len(reader.own(message["content"] + "<|eot_id|>", add_special_tokens=False).input_ids)
        for document in documents
        for message in document["messages"]
        if message["role"] == "assistant"
    )
    assert sum(map(int, row(data(desk).stdout, "trained tokens"))) == by_hand


def test_a_faulty_file_is_an_error_with_its_line(desk: Path) -> None:
    with (desk / "specs/data/facts.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "boss", "content": "x"}]}\n')
    done = data(desk)
    assert done.returncode == 1
    assert "specs/data/facts.jsonl:21: message 1 has the unknown role 'boss'" in done.stderr
    assert "Traceback" not in done.stderr


def test_too_long_conversations_are_told(desk: Path) -> None:
    done = data(desk, "--set", "seq_length=256")
    assert done.returncode == 1
    assert "of 20 examples have more than 256 tokens, which is seq_length" in done.stderr
    done = data(desk, "--set", "seq_length=256", "--set", "data.too_long=drop")
    assert done.returncode == 0
    assert int(row(done.stdout, "dropped")[0]) > 0
    assert "warning: training: " in done.stdout


def test_a_job_finds_the_data_that_was_shown(desk: Path, stage: Stage) -> None:
    document = json.loads(
        subprocess.run(
            [sys.executable, "-m", "ftgen", "plan", str(SPEC), "--json"],
            env=environment(desk), capture_output=True, text=True, check=True,
        ).stdout
    )  # fmt: skip
    assert stage.path == desk
    status, output = stage.run(document, "data")
    assert status == 0
    assert "ftgen: tokenizing the data ..." in output
    assert stage.run(document, "convert")[0] == 0
    status, output = stage.run(document | {"epochs": 1}, "finetune")
    assert status == 0, output
    assert "the data ..." not in output  # the tokenizer of the converted checkpoint is another file, and the same


def test_colour_is_for_terminals_alone(tmp_path: Path) -> None:
    reader = Tokenizer(write_tokenizer(tmp_path / "tokenizer"), template("llama3"))
    (tokens,) = reader.tokens([conversation(said("user: a\x1b[2J", "assistant: b"))])
    assert isinstance(tokens, Tokens)
    writer = store.Writer()
    writer.add(tokens, 0)
    examples = writer.write(tmp_path, "training")
    plain = show_data.example(reader, examples, colour=False)
    assert plain.endswith("{+b<|eot_id|>+}")
    assert "\x1b" not in plain  # nothing of the data can steer the terminal
    assert show_data.example(reader, examples, colour=True) == plain.replace(
        "{+b<|eot_id|>+}", "\x1b[1;32m{+b<|eot_id|>+}\x1b[0m"
    )


def test_a_terminal_gets_colour_unless_told_otherwise(desk: Path) -> None:
    for more, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        reader, terminal = pty.openpty()
        command = [sys.executable, "-m", "ftgen", "data", str(SPEC)]
        process = subprocess.Popen(command, cwd=desk, env={**environment(desk), **more}, stdout=terminal, stderr=terminal)
        os.close(terminal)
        output = b""
        while chunk := _read(reader):
            output += chunk
        assert process.wait(60) == 0, output
        assert (b"\x1b[1;32m{+" in output) == coloured


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except OSError:  # the other side is closed
        return b""


def test_a_multi_node_plan_can_be_shown_on_one_machine(desk: Path) -> None:
    more = ["gpu=h100", "precision=bf16", "gpus=16", "seq_length=512", "window.last_steps=1", "epochs=1"]
    done = data(desk, *(word for text in more for word in ("--set", text)))
    assert (done.returncode, done.stderr) == (0, "")
    assert row(done.stdout, "packs")[0] == "7"
    assert float(row(done.stdout, "fill of a pack")[0].rstrip("%")) > 85
    assert "1 epoch of 7 packs are 1 steps of 64 packs; the last step has 57 packs of one more epoch" in done.stdout


def test_the_quickstart_on_conversations_learns_them(desk: Path, ftgen: Any) -> None:
    assert ftgen("compile", SPEC, "--out", desk / "out").returncode == 0
    script = shutil.copy(desk / "out" / "quickstart_chat.sh", desk)  # alone: the chat template travels in it
    command = ["bash", script]
    done = subprocess.run(command, cwd=desk, env=environment(desk), capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    losses = [float(loss) for loss in re.findall(r"reduced_train_loss: (\S+)", done.stdout)]
    assert len(losses) == 95
    assert losses[-1] < losses[0] / 3
    (run,) = json.loads(ftgen("tabulate", desk / "logs", "--format", "json").stdout)["runs"]
    assert (run["status"], run["steps"], run["planned_steps"]) == ("complete", 95, 95)
