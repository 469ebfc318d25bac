"""Exports of checkpoints that Megatron-Bridge trained on the CPU: the exported model is the trained one."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bridge import PYTHON, bridge_stage
from exports import LORA, SHAPE, Case, Trained, difference, environment, load, train, write_bases
from stages import Stage

from runtime.export import export
from runtime.weights import base, checkpoint, random_llama, shards

pytestmark = pytest.mark.runtime
QKV = {"lora": {"rank": 8, "targets": ["linear_qkv"]}}
BRIDGE = {"engine": "megatron_bridge"}
CASES = {
    "llama, SFT": Case("tiny_llama", **BRIDGE),
    "llama 3.2, LoRA": Case("llama32", "llama32", spec=LORA, **BRIDGE),
    "qwen, SFT, TP 2": Case("qwen", "qwen", tensor_parallel=2, **BRIDGE),
    "mistral, LoRA of queries, keys and values": Case("mistral", "mistral", spec=LORA | QKV, **BRIDGE),
}
SAME = 2e-6  # largest difference of a logit as a fraction of the largest one


@pytest.fixture(scope="module")
def runs(make_stage: Callable[[], Stage]) -> dict[str, Trained]:
    stage = bridge_stage(make_stage())
    write_bases(stage.path)
    # transformers 5 gives every tokenizer of a Qwen the token <|endoftext|>, and the model must have a row for it
    random_llama.write_tokenizer(SHAPE["vocab_size"] - 1, 256, stage.path / "qwen")
    return {name: train(stage, re.sub(r"\W+", "_", name), case) for name, case in CASES.items()}


@pytest.fixture
def stage_path(runs: dict[str, Trained], monkeypatch: pytest.MonkeyPatch) -> Path:
    return environment(runs["llama, SFT"].directory.parent, monkeypatch)


def exported(run: Trained, what: str) -> Path:
    assert export.export(run.plan | {"export": {"what": [what]}}, str(run.directory)) == 0
    return run.directory / "exports" / "step_3" / what


@pytest.mark.parametrize("name", CASES)
def test_the_exported_model_is_the_trained_model(name: str, runs: dict[str, Trained], stage_path: Path) -> None:
    folder = exported(runs[name], "merged")
    found = difference(load(folder), runs[name])
    print(f"{name}: {found:.1e} of the largest logit")
    assert found < SAME
    before = load(stage_path / CASES[name].base) if CASES[name].base else None
    assert before is None or difference(before, runs[name]) > 0.1  # the training did something


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.spec])
def test_peft_loads_the_adapters_onto_the_base(name: str, runs: dict[str, Trained], stage_path: Path) -> None:
    from peft import PeftModel

    folder = exported(runs[name], "adapter")
    found = difference(PeftModel.from_pretrained(load(stage_path / CASES[name].base), folder), runs[name])
    print(f"{name}: {found:.1e} of the largest logit")
    assert found < SAME


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.base])
def test_all_that_belongs_to_the_base_is_in_the_export(name: str, runs: dict[str, Trained], stage_path: Path) -> None:
    folder, original = exported(runs[name], "merged"), stage_path / CASES[name].base
    for file in ("generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE.txt"):
        assert (folder / file).read_bytes() == (original / file).read_bytes()
    if base.config(folder).get("tie_word_embeddings") == base.config(original).get("tie_word_embeddings"):
        assert shards.entries(folder, shards.files_of(folder)) == shards.entries(original, shards.files_of(original))
    assert (checkpoint.directory(runs[name].plan) / base.FOLDER / base.TENSORS).is_file()


def test_the_card_says_what_was_trained(runs: dict[str, Trained], stage_path: Path) -> None:
    run = runs["llama 3.2, LoRA"]
    card = (exported(run, "merged") / "README.md").read_text()
    output = (run.directory / "log-test.tiny_1_0.out").read_text()
    losses = re.findall(r"\| lm loss: (\S+)", output)
    rows = [f"| loss of step 1 | {losses[0]} |", f"| loss of step 3 | {losses[2]} |", "| megatron-bridge | 0.6.2 |"]
    for row in rows:
        assert row in card.splitlines()
    assert f"Trained with ftgen {run.plan['ftgen_version']} and Megatron-Bridge: " in card
    assert str(stage_path) not in card


def test_the_script_exports_after_the_training_and_by_hand(tmp_path: Path) -> None:
    alone, out = tmp_path / "alone", tmp_path / "out"
    alone.mkdir()
    sets = ["engine=megatron_bridge", "save.every_steps=4", "max_steps=4", "window.last_steps=2", "scheme=lora"]
    sets += ['export.what=["merged", "adapter"]', "validation.every_steps=2"]
    command = [sys.executable, "-m", "ftgen", "compile", "specs/quickstart.toml", "--out", out]
    root = Path(__file__).parents[2]
    subprocess.run([*command, *(word for text in sets for word in ("--set", text))], cwd=root, check=True)
    script = shutil.copy(out / "quickstart.sh", alone)
    environment = {"PATH": f"{PYTHON.parent}:{os.environ['PATH']}", "HOME": str(alone)}

    def run(*arguments: str) -> str:
        command = ["bash", script, *arguments]
        options: dict[str, Any] = {"cwd": alone, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(command, check=False, timeout=600, **options)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        return str(done.stdout)

    assert run().count("ftgen: the export is ready: ") == 2
    (made,) = alone.glob("logs/experiments/*/*/*/exports/step_4")
    findings = json.loads((made / "merged" / "manifest.json").read_text())["origin"]["findings"]
    assert any("logits of the model that transformers loads differ" in finding for finding in findings)
    assert any("greedy completion of " in finding for finding in findings)
    assert run("--export").count("ftgen: the export exists: ") == 2
    command = [sys.executable, "-m", "ftgen", "tabulate", str(alone / "logs"), "--format", "json"]
    (row,) = json.loads(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)["runs"]
    assert (row["engine"], row["status"]) == ("megatron_bridge", "complete")
    assert row["validation_loss"] > 0
    assert not (alone / "exports").exists()
