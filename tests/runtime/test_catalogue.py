"""Every catalogued model as NeMo's own recipe has it, before and after the plan is put over it. Imports NeMo once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ftgen import catalogue

ROOT = Path(__file__).parent.parent.parent
# What NeMo 2.7.3 says otherwise than the model's own config.json, which the catalogue follows.
DIFFERS = {("mistral_7b", "rotary_base"): 10000}  # v0.3 has 1000000
# NeMo's recipe counts 126 layers, the embedding and the loss as 128 for 4 stages of 4 chunks; the plan's 6 x 7 divide 126.
OTHER_SPLIT = {
    ("llama31_405b", "lora"),
    ("llama3_8b", "sft"),
    ("llama31_8b", "sft"),
}  # and the recipe's SFT of an 8B has TP 1
READER = """
import importlib, json, sys, tempfile
from pathlib import Path
from runtime.engines.nemo import recipe as ours
KEYS = ("num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels rotary_base add_qkv_bias "
        "share_embeddings_and_output_weights scale_factor").split()
def read(recipe):
    config, strategy = recipe.model.config, recipe.trainer.strategy
    split = [f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline", "virtual_pipeline")] + ["sequence_parallel"]
    values = {key: getattr(config, key, None) for key in KEYS}
    return values | {key: getattr(strategy, key) for key in split} | {"hf_id": recipe.resume.restore_config.path}
found = {}
for name, plan in json.load(sys.stdin).items():
    recipe = ours.stock(plan, Path("logs"))
    before = read(recipe)
    ours.set_model(recipe, plan)
    found[name] = [before, read(recipe)]
print("FOUND", json.dumps(found))
"""
SPEC = 'scheme = "{scheme}"\nprecision = "bf16"\ngpus = {gpus}\nmodel = "{model}"\n'


@pytest.fixture(scope="module")
def configurations(tmp_path_factory) -> dict[str, tuple[dict, dict, dict]]:
    """By model and scheme: the plan, NeMo's recipe, and the same with the plan over it."""
    from ftgen.plan.experiments import load_one

    folder = tmp_path_factory.mktemp("catalogue")
    plans = {}
    for model in catalogue.models().values():
        for scheme in ("lora", "sft"):
            split = model.split(scheme, 80) or catalogue.Split(scheme, 80)
            gpus = 64 * split.tensor_model_parallel_size * split.pipeline_model_parallel_size  # and the optimizer in 64
            spec = folder / f"{model.name}_{scheme}.toml"
            spec.write_text(SPEC.format(scheme=scheme, gpus=gpus, model=model.name))
            if model.checkpoint == "hub":
                plans[spec.stem] = json.loads(load_one(spec, None, ()).plan.to_json())
    done = subprocess.run(
        [sys.executable, "-c", READER], input=json.dumps(plans), capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return {name: (plans[name], *pair) for name, pair in json.loads(line.removeprefix("FOUND ")).items()}


MODELS = [name for name, model in catalogue.models().items() if model.checkpoint == "hub"]


@pytest.mark.runtime
@pytest.mark.parametrize("scheme", ["lora", "sft"])
@pytest.mark.parametrize("model", MODELS)
def test_the_plan_is_nemos_own_configuration(configurations, model, scheme):
    plan, before, after = configurations[f"{model}_{scheme}"]
    said = plan["model"]
    expected = {key: said[key] for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")}
    expected |= {"num_query_groups": said["num_query_groups"], "rotary_base": said["rope_theta"]}
    expected |= {"add_qkv_bias": said["qkv_bias"], "share_embeddings_and_output_weights": said["tied_embeddings"]}
    expected |= {"scale_factor": said["rope_scaling_factor"], "kv_channels": said["head_size"]}
    before["kv_channels"] = before["kv_channels"] or before["hidden_size"] // before["num_attention_heads"]
    nemo = {key: DIFFERS.get((model, key), value) for key, value in expected.items()}
    assert {key: before[key] for key in expected} == nemo
    assert {key: after[key] for key in expected} == expected
    assert before["hf_id"] == f"nemo://{said['hf_id']}"
    if (model, scheme) not in OTHER_SPLIT:
        split = {key: value for key, value in plan["parallelism"].items() if key in before}
        assert {key: before[key] for key in split} == split
