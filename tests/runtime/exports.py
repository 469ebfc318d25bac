"""Trainings of the catalogue's families, tiny, and their exports.

In: a `Case`. Out: a `Trained`: the run's checkpoint, and the logits of the model that was trained.
"""

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from stages import INHERITED, TINY, Stage
from trained_logits import tokens

from ftgen.catalogue import Model, UserCatalogue, models
from ftgen.plan.resolve import resolve
from ftgen.spec.site import Site
from ftgen.spec.spec import Spec

PROGRAM = Path(__file__).with_name("trained_logits.py")
ALL_TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
LORA: dict[str, Any] = {
    "scheme": "lora",
    "lora": {"rank": 4, "alpha": 12, "targets": ALL_TARGETS},
    "optimizer": {"learning_rate": 2e-2, "warmup_steps": 1},
}
SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 384,  # 3 x 128: with TP 2, Megatron pads it to 512
    "max_position_embeddings": 256,
}


BRIDGE_RECIPES = {
    "llama32_1b": "llama.h100.llama3:llama32_1b",
    "qwen25_7b": "qwen.h100.qwen2:qwen25_7b",
    "mistral_7b": "llama.h100.llama3:llama3_8b",
}


def _model(name: str, recipe: str, rope_theta: float, **more: Any) -> Model:
    fixed = {"hf_id": f"test/{name}", "checkpoint": "hub", "gated": False, "title": name, "source": "invented"}
    recipes = {"nemo_recipe": recipe, "megatron_bridge_recipe": BRIDGE_RECIPES[recipe]}
    return Model(name=name, rope_theta=rope_theta, **fixed | recipes | SHAPE | more)


MODELS = {
    "llama32": _model("llama32", "llama32_1b", 500000.0, tied_embeddings=True, rope_scaling_factor=32.0),
    "qwen": _model("qwen", "qwen25_7b", 1e6, tied_embeddings=True, qkv_bias=True),
    "qwen_untied": _model("qwen_untied", "qwen25_7b", 1e6, qkv_bias=True),
    "mistral": _model("mistral", "mistral_7b", 1e6, kv_channels=24),
}


class Case(NamedTuple):
    """What is trained."""

    model: str
    base: str = ""  # a directory of `write_bases`; "": the random weights of the catalogue's tiny model
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    spec: dict[str, Any] = {}  # noqa: RUF012 - never changed
    engine: str = "nemo"


class Trained(NamedTuple):
    """A run that has ended."""

    plan: dict[str, Any]
    directory: Path
    logits: Any  # of the trained model, in Megatron


def plan(case: Case) -> dict[str, Any]:
    """The plan of a case. No spec may split a model on a CPU, so that is changed in the plan."""
    ranks = case.tensor_parallel * case.pipeline_parallel
    fixed = {"engine": case.engine, "model": case.model, "gpus": ranks, "gpus_per_node": ranks}
    fixed |= {"max_steps": 3, "save": {"every_steps": 3}}
    fixed |= {"checkpoint": {"source": "directory", "path": case.base}} if case.base else {}
    spec = Spec.model_validate(TINY | fixed | case.spec)
    document = asdict(resolve(spec, Site(), name="tiny", user_catalogue=UserCatalogue(MODELS, {})))
    split = {"tensor_model_parallel_size": case.tensor_parallel, "pipeline_model_parallel_size": case.pipeline_parallel}
    document["parallelism"] |= split | {"data_parallel_size": 1}
    return dict(json.loads(json.dumps(document)))


def train(stage: Stage, name: str, case: Case) -> Trained:
    """Convert the base, train, and save the last step."""
    import numpy as np

    document = plan(case)
    status, output = stage.run(document, "convert")
    assert status == 0, output
    directory, file = stage.path / name, stage.path / f"{name}.json"
    file.write_text(json.dumps(document))
    ranks = [_start(stage, document, directory, file, rank) for rank in range(document["gpus"])]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(output[-3000:] for output in outputs)
    (directory / "log-test.tiny_1_0.out").write_text(outputs[0])
    return Trained(document, directory, np.load(stage.path / f"{name}.npy"))


def _start(stage: Stage, document: dict[str, Any], directory: Path, file: Path, rank: int) -> subprocess.Popen[str]:
    own = {
        "STAGE_PATH": stage.path,
        "NEMO_HOME": stage.home,
        "HF_HOME": stage.home,
        "FTGEN_RUN_DIR": directory,
        "LOGITS": f"{directory}.npy",
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": document["gpus"],
        "NODE_RANK": 0,
        "MASTER_PORT": 27000 + abs(hash(str(directory))) % 2000,
        "OMP_NUM_THREADS": 1,
    }
    inherited = {key: value for key, value in os.environ.items() if key not in INHERITED}
    return subprocess.Popen(
        [stage.python, "-u", str(PROGRAM), str(file), "finetune"],
        env=inherited | {key: str(value) for key, value in own.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def write_bases(folder: Path) -> None:
    """Bases in Hugging Face format, as transformers makes them, with random weights: one for each model, and one in BF16."""
    import torch
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    _write(folder / "llama32", LlamaConfig(rope_theta=5e5, rope_scaling=scaling, tie_word_embeddings=True, **_shape()))
    _write(folder / "qwen", Qwen2Config(rope_theta=1e6, tie_word_embeddings=True, **_shape()))
    _write(folder / "qwen_bf16", Qwen2Config(rope_theta=1e6, tie_word_embeddings=False, **_shape()), torch.bfloat16)
    _write(folder / "mistral", MistralConfig(rope_theta=1e6, head_dim=24, sliding_window=None, **_shape()))


def _shape() -> dict[str, Any]:
    names = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "num_key_value_heads": "num_query_groups",
    }
    same = ("hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
    return {key: SHAPE[key] for key in same} | {key: SHAPE[value] for key, value in names.items()}


def _write(folder: Path, config: Any, dtype: Any = None) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from runtime.weights import random_llama

    torch.manual_seed(7)
    config.rms_norm_eps = 1e-6 if config.model_type == "qwen2" else 1e-5
    config.initializer_range = 0.1  # so that each weight matters for the logits
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # otherwise zeros and ones, which nothing can mix up
            torch.nn.init.normal_(weight, mean=float(name.endswith("norm.weight")), std=0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size="200KB")
    random_llama.write_tokenizer(SHAPE["vocab_size"], 256, folder)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    (folder / "LICENSE.txt").write_text("A license.\n")


def environment(stage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the stage that of exports in this process."""
    values = {"STAGE_PATH": stage, "NEMO_HOME": stage / "HF_ckpt", "HF_HOME": stage / "HF_ckpt"}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    return stage


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


assert not MODELS.keys() & models().keys()
