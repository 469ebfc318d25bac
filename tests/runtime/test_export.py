"""Exports of checkpoints that real NeMo trained on the CPU: the exported model is the trained one."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exports import LORA, Case, Trained, plan, train, write_bases
from stages import Stage
from trained_logits import tokens

from runtime.engines.nemo import convert, export
from runtime.guard import manifest
from runtime.job.errors import JobError
from runtime.weights import base, shards

pytestmark = pytest.mark.runtime
QKV = {"lora": {"rank": 8, "targets": ["linear_qkv"]}}
CASES = {
    "llama, SFT": Case("tiny_llama"),
    "llama 3.2, LoRA, PP 2": Case("llama32", "llama32", pipeline_parallel=2, spec=LORA),
    "qwen, SFT, TP 2": Case("qwen", "qwen", tensor_parallel=2),
    "qwen in BF16, LoRA, TP 2": Case("qwen_untied", "qwen_bf16", tensor_parallel=2, spec=LORA),
    "qwen, SFT, its head trained by itself": Case("qwen_untied", "qwen"),
    "mistral, LoRA of queries, keys and values": Case("mistral", "mistral", spec=LORA | QKV),
}
WITH_ADAPTERS = [name for name, case in CASES.items() if case.spec]
# Largest difference of a logit as a fraction of the largest one. Merged weights in BF16 were rounded to 8 bits.
BOUND = {"qwen in BF16, LoRA, TP 2": 2e-2}


@pytest.fixture(scope="session")
def runs(make_stage: Callable[[], Stage]) -> dict[str, Trained]:
    stage = make_stage()
    write_bases(stage.path)
    return {name: train(stage, re.sub(r"\W+", "_", name), case) for name, case in CASES.items()}


@pytest.fixture
def environment(runs: dict[str, Trained], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of an export, in this process. The stage's path."""
    stage = runs["llama, SFT"].directory.parent
    values = {"STAGE_PATH": stage, "NEMO_HOME": stage / "HF_ckpt", "HF_HOME": stage / "HF_ckpt"}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    return stage


def exported(run: Trained, what: str) -> Path:
    """The export of the run's checkpoint, which is made if it does not exist."""
    assert export.export(run.plan | {"export": {"what": [what]}}, str(run.directory)) == 0
    return run.directory / "exports" / "step_3" / what


def difference(model: Any, run: Trained) -> float:
    """Of the logits of a loaded model and of those that Megatron computed at the end of the training."""
    import torch

    with torch.no_grad():
        found = model(input_ids=tokens(run.plan["model"]["vocab_size"])).logits[0].numpy()
    return float(abs(found - run.logits).max() / abs(run.logits).max())


def load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", CASES)
def test_the_exported_model_is_the_trained_model(name: str, runs: dict[str, Trained], environment: Path) -> None:
    folder = exported(runs[name], "merged")
    found = difference(load(folder), runs[name])
    print(f"{name}: {found:.1e}")
    assert found < BOUND.get(name, 2e-6)
    before = load(environment / CASES[name].base) if CASES[name].base else None
    assert before is None or difference(before, runs[name]) > 0.1  # the training did something


@pytest.mark.parametrize("name", WITH_ADAPTERS)
def test_peft_loads_the_adapters_onto_the_base(name: str, runs: dict[str, Trained], environment: Path) -> None:
    from peft import PeftModel

    folder = exported(runs[name], "adapter")
    model = PeftModel.from_pretrained(load(environment / CASES[name].base), folder)
    assert difference(model, runs[name]) < 2e-6
    config = json.loads((folder / "adapter_config.json").read_text())
    asked = runs[name].plan["lora"]
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (asked["rank"], asked["alpha"], "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str(environment / CASES[name].base)
    assert len(config["target_modules"]) == (7 if len(asked["targets"]) == 4 else 3)
