"""A real conversion and a real training of what `--download` fetched: they ask the hub nothing, and need no token."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub
from stages import plan

from runtime.weights import random_llama

pytestmark = pytest.mark.runtime
ROOT = Path(__file__).parents[2]
SPEC = """scheme = "sft"
precision = "fp32"
gpus = 1
gpu = "cpu"
model = "tiny_llama"
seq_length = 128
global_batch_size = 4
max_steps = 3
window = { last_steps = 1 }
checkpoint = { source = "hub" }
data = { kind = "squad" }
"""


def squad(count: int) -> bytes:
    """Examples in the columns of SQuAD's files on the hub."""
    import pyarrow
    import pyarrow.parquet

    texts = [f"In {1900 + number} the river Aa was {number} metres deep." for number in range(count)]
    answers = [{"text": [f"{number} metres"], "answer_start": [25]} for number in range(count)]
    columns = {"id": [str(n) for n in range(count)], "title": ["Aa"] * count, "context": texts}
    table = pyarrow.table(columns | {"question": ["How deep was the river?"] * count, "answers": answers})
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    random_llama.write(plan(), tmp_path / "weights")
    hub = Hub()
    hub.files["models/ftgen/tiny-llama"] = {path.name: path.read_bytes() for path in (tmp_path / "weights").iterdir()}
    hub.files["datasets/rajpurkar/squad"] = {
        "plain_text/train-00000-of-00001.parquet": squad(200),
        "plain_text/validation-00000-of-00001.parquet": squad(20),
    }
    yield hub
    hub.close()


@pytest.mark.parametrize("downloaded_before", [True, False])
def test_a_job_converts_and_trains_and_asks_the_hub_only_for_what_is_missing(
    downloaded_before: bool, hub: Hub, tmp_path: Path
) -> None:
    (tmp_path / "tiny.toml").write_text(SPEC)
    command = [sys.executable, "-m", "ftgen", "compile", tmp_path / "tiny.toml", "--out", tmp_path]
    subprocess.run(command, check=True, cwd=ROOT)
    stage = tmp_path / "stage"
    stage.mkdir()
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    environment |= {"STAGE_PATH": str(stage), "HF_ENDPOINT": hub.url}

    def script(*arguments: str) -> str:
        done = subprocess.run(
            ["bash", tmp_path / "tiny.sh", *arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        return done.stdout

    if downloaded_before:
        script("--download")
        hub.asked.clear()
    output = script()
    assert "iteration 2/2" in output
    asked = [asked.path for asked in hub.asked]
    if downloaded_before:
        assert asked == []
    else:  # one list for each repository, and its files once
        assert sum(path.startswith("/api/") for path in asked) == 2
        assert len(asked) == len(set(asked))
    (examples,) = stage.glob("data/squad-*/training.jsonl")
    assert len(examples.read_text().splitlines()) == 190
    assert '"input": "Context: In 19' in examples.read_text()
    assert "the converted checkpoint exists" in script()
    assert len(hub.asked) == len(asked)
