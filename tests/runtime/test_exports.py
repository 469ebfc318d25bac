"""Exports of checkpoints that real NeMo trained on the CPU: the exported model is the trained one, or there is no export."""

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
import torch
from exports import LORA, Case, Trained, difference, environment, load, train, write_bases
from safetensors.torch import load_file, save_file
from stages import Stage
from trained_logits import tokens

from runtime.engines.nemo import convert
from runtime.export import check, export, forward, names
from runtime.export.trained import Trained as TrainedWeights
from runtime.guard import manifest
from runtime.job.errors import JobError
from runtime.weights import base, reload, shards
from runtime.weights.distributed import Checkpoint

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
SAME = 2e-6
BOUND = {"qwen in BF16, LoRA, TP 2": 2e-2}


@pytest.fixture(scope="session")
def runs(make_stage: Callable[[], Stage]) -> dict[str, Trained]:
    stage = make_stage()
    write_bases(stage.path)
    return {name: train(stage, re.sub(r"\W+", "_", name), case) for name, case in CASES.items()}


@pytest.fixture
def stage_path(runs: dict[str, Trained], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stage of the runs, which is also that of exports in this process."""
    return environment(runs["llama, SFT"].directory.parent, monkeypatch)


def exported(run: Trained, what: str) -> Path:
    """The export of the run's checkpoint, which is made if it does not exist."""
    assert export.export(asking(run, what), str(run.directory)) == 0
    return run.directory / "exports" / "step_3" / what


def asking(run: Trained, *what: str) -> dict[str, Any]:
    return run.plan | {"export": {"what": list(what)}}


# --- what is exported is what was trained


@pytest.mark.parametrize("name", CASES)
def test_the_exported_model_is_the_trained_model(name: str, runs: dict[str, Trained], stage_path: Path) -> None:
    folder = exported(runs[name], "merged")
    found = difference(load(folder), runs[name])
    print(f"{name}: {found:.1e} of the largest logit")
    assert found < BOUND.get(name, SAME)
    before = load(stage_path / CASES[name].base) if CASES[name].base else None
    assert before is None or difference(before, runs[name]) > 0.1  # the training did something


@pytest.mark.parametrize("name", WITH_ADAPTERS)
def test_peft_loads_the_adapters_onto_the_base(name: str, runs: dict[str, Trained], stage_path: Path) -> None:
    from peft import PeftModel

    folder = exported(runs[name], "adapter")
    model = PeftModel.from_pretrained(load(stage_path / CASES[name].base), folder)
    found = difference(model, runs[name])
    print(f"{name}: {found:.1e} of the largest logit")
    assert found < SAME
    config = json.loads((folder / "adapter_config.json").read_text())
    asked = runs[name].plan["lora"]
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (asked["rank"], asked["alpha"], "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str(stage_path / CASES[name].base)
    assert len(config["target_modules"]) == (7 if len(asked["targets"]) == 4 else 3)


@pytest.mark.parametrize("name", CASES)
def test_the_independent_path_computes_what_megatron_computed(name: str, runs: dict[str, Trained], stage_path: Path) -> None:
    run = runs[name]
    config = base.config(convert.directory(run.plan) / base.FOLDER)
    found = forward.logits(
        weights_of(run), tokens(run.plan["model"]["vocab_size"])[0].tolist(), config["rms_norm_eps"]
    ).numpy()
    assert abs(found - run.logits).max() / abs(run.logits).max() < SAME


def weights_of(run: Trained) -> TrainedWeights:
    trained = Checkpoint(run.directory / "checkpoints" / "step_3" / "weights")
    converted = Checkpoint(convert.directory(run.plan) / "weights")
    return TrainedWeights(run.plan, *((converted, trained) if run.plan["lora"] else (trained, None)))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.base])
def test_a_base_that_was_converted_is_exported_bit_for_bit(name: str, runs: dict[str, Trained], stage_path: Path) -> None:
    plan = runs[name].plan
    tied = plan["model"] | {"tied_embeddings": base.config(stage_path / CASES[name].base)["tie_word_embeddings"]}
    converted = TrainedWeights(plan | {"model": tied}, Checkpoint(convert.directory(plan) / "weights"), None)
    original = stage_path / CASES[name].base
    entries = shards.entries(original, shards.files_of(original))
    different = [
        name
        for name, entry in entries.items()
        if not converted.weight(name, shards.torch_dtype(entry.dtype)).equal(shards.read(original, name, entry))
    ]
    assert different == []
    assert len(entries) >= 2 * 9 + 2  # weights of a layer, embedding, last norm


def test_all_that_belongs_to_the_base_is_in_the_export(runs: dict[str, Trained], stage_path: Path) -> None:
    folder, original = exported(runs["llama 3.2, LoRA, PP 2"], "merged"), stage_path / "llama32"
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE.txt"):
        assert (folder / name).read_bytes() == (original / name).read_bytes()
    files = {path.name for path in folder.iterdir()}
    assert files == {path.name for path in original.iterdir()} | {"README.md", "manifest.json"}
    assert shards.entries(folder, shards.files_of(folder)) == shards.entries(original, shards.files_of(original))


def test_a_head_that_was_trained_by_itself_is_not_tied_again(runs: dict[str, Trained], stage_path: Path) -> None:
    folder = exported(runs["qwen, SFT, its head trained by itself"], "merged")
    assert base.config(stage_path / "qwen")["tie_word_embeddings"] is True
    assert base.config(folder) == base.config(stage_path / "qwen") | {"tie_word_embeddings": False}
    assert "lm_head.weight" in shards.entries(folder, shards.files_of(folder))
    assert "- config.json: tie_word_embeddings is false now" in (folder / "README.md").read_text()


def test_the_tokenizer_has_the_chat_template_that_the_model_was_trained_with(
    runs: dict[str, Trained], stage_path: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    run = runs["mistral, LoRA of queries, keys and values"]
    copy = tmp_path / "checkpoints" / "step_3"
    shutil.copytree(run.directory / "checkpoints" / "step_3", copy)
    document = json.loads((copy / "manifest.json").read_text())
    document["plan"]["data"]["chat_template"] = "{{ messages[0]['content'] }}!"
    (copy / "manifest.json").write_text(json.dumps(document))
    export.export(asking(run, "adapter"), str(copy))
    folder = tmp_path / "exports" / "step_3" / "adapter"
    found = AutoTokenizer.from_pretrained(folder)
    assert found.apply_chat_template([{"role": "user", "content": "yes"}], tokenize=False) == "yes!"
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages[0]['content'] }}!"


# --- the model card


def test_the_card_says_what_was_trained_and_names_no_path(runs: dict[str, Trained], stage_path: Path) -> None:
    run = runs["qwen in BF16, LoRA, TP 2"]
    card = (exported(run, "merged") / "README.md").read_text()
    document = json.loads((run.directory / "checkpoints/step_3/manifest.json").read_text())
    output = (run.directory / "log-test.tiny_1_0.out").read_text()
    losses = re.findall(r"reduced_train_loss: (\S+)", output)
    for row in (
        "| model | qwen_bf16 |",
        f"| prepared as | {', '.join(document['data'])} |",
        f"| loss of step 1 | {losses[0]} |",
        f"| loss of step 3 | {losses[2]} |",
        "| lora.rank | 4 |",
        "| parallelism.tensor_model_parallel_size | 2 |",
        f"| spec | tiny.toml, sha256 {run.plan['spec_sha256']} |",
        "| nemo_toolkit | 2.7.3 |",
    ):
        assert row in card.splitlines()
    assert str(stage_path) not in card
    assert str(Path.home()) not in card
    assert "bfloat16" not in card.partition("## Checks")[0]


# --- exports that are wrong are refused


def unlike(run: Trained, folder: Path, change: Callable[[Any], None]) -> reload.Reloaded:
    """The export in `folder`, with a config that was changed."""
    shutil.copytree(exported(run, "merged"), folder)
    config = base.config(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return reload.Reloaded(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 10000.0},
        {"rms_norm_eps": 1e-2},
        {"rope_scaling": None},
        {"hidden_act": "gelu"},
        {"num_attention_heads": 2, "head_dim": 32, "num_key_value_heads": 1},
    ],
)
def test_a_config_that_describes_another_model_is_refused(
    change: dict[str, Any], runs: dict[str, Trained], stage_path: Path, tmp_path: Path
) -> None:
    run = runs["llama 3.2, LoRA, PP 2"]
    weights = weights_of(run)
    right = reload.Reloaded(exported(run, "merged"))
    expected = check.reference(weights, 1e-5, torch.float32)
    check.behaviour(right, expected)
    wrong = unlike(run, tmp_path / "wrong", lambda config: config.update(change))
    with pytest.raises(JobError, match="the exported model is not the trained model: logits differ by"):
        check.behaviour(wrong, expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen, SFT, TP 2", 1.2e-7),  # one bit of float32
        ("llama 3.2, LoRA, PP 2", 1e-5),
        ("qwen in BF16, LoRA, TP 2", 1e-2),
    ],
)
def test_one_changed_value_of_a_file_is_found(
    name: str, change: float, runs: dict[str, Trained], stage_path: Path, tmp_path: Path
) -> None:
    run, weight = runs[name], "model.layers.1.mlp.up_proj.weight"
    folder = tmp_path / "copy"
    shutil.copytree(exported(run, "merged"), folder)
    weights, tensors = weights_of(run), base.tensors(convert.directory(run.plan) / base.FOLDER)
    check.values(folder, tensors, weights)
    content = load_file(folder / tensors[weight].file)
    content[weight][3, 5] *= 1 + change
    save_file(content, folder / tensors[weight].file)
    with pytest.raises(JobError, match=f"{weight} differs from "):
        check.values(folder, tensors, weights)


@pytest.mark.parametrize(
    "swap",
    [{"q": "k", "k": "v", "v": "k"}, {"gate": "up", "up": "gate"}],
)
def test_rows_of_another_part_are_found(
    swap: dict[str, str], runs: dict[str, Trained], stage_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs["llama, SFT"]
    real = names.rows
    swap = {part: other for part, other in swap.items() if part != "q"}  # queries have another shape
    monkeypatch.setattr(names, "rows", lambda tensor, part, model: real(tensor, swap.get(part, part), model))
    place = run.directory / "exports" / "step_3" / "merged"
    aside = place.rename(place.with_name("aside")) if place.exists() else None
    with pytest.raises(JobError, match="differs from the checkpoint"):
        exported(run, "merged")
    assert not place.exists()
    assert not list(place.parent.glob(".*.staging-*"))
    if aside:
        aside.rename(place)


def test_a_trained_model_that_repeats_a_token_is_a_warning(runs: dict[str, Trained], stage_path: Path) -> None:
    model = reload.Reloaded(exported(runs["llama, SFT"], "merged"))
    model._model.lm_head.weight.data[:] = 0
    model._model.lm_head.weight.data[7] = 1e3 * model._model.model.norm.weight.data.sign()
    found = check.completion(model)
    assert found.startswith(("warning: the trained model repeats one token: ", "greedy completion of "))


# --- errors


def test_an_export_that_exists_is_kept(
    runs: dict[str, Trained], stage_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["llama, SFT"]
    folder = exported(run, "merged")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    assert exported(run, "merged") == folder
    assert capsys.readouterr().out == f"ftgen: the export exists: {folder}\n"
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "config.json").write_text("{}")
    exported(run, "merged")
    assert "config.json has 2 bytes" in capsys.readouterr().out
    assert manifest.flaw(folder, json.loads((folder / "manifest.json").read_text())["source"], thorough=True) is None


def test_adapters_of_a_run_that_has_none_cannot_be_exported(runs: dict[str, Trained], stage_path: Path) -> None:
    run = runs["llama, SFT"]
    with pytest.raises(JobError, match="step_3 has no adapters: it was trained with SFT"):
        export.export(asking(run, "adapter"), str(run.directory))


def test_a_checkpoint_or_its_run_is_found_and_a_damaged_one_is_refused(
    runs: dict[str, Trained], stage_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs["mistral, LoRA of queries, keys and values"]
    experiment = tmp_path / "logs" / "experiments" / "e"
    copy = experiment / "e_7" / "e"
    shutil.copytree(run.directory / "checkpoints", copy / "checkpoints")
    monkeypatch.setenv("FTGEN_RUN_DIR", str(experiment / "e_8" / "e"))  # this job's own
    for given in ("", str(copy), str(copy.parent), str(copy / "checkpoints" / "step_3")):
        export.export(asking(run, "adapter"), given)
        assert (copy / "exports" / "step_3" / "adapter" / "README.md").exists()
    weights = copy / "checkpoints" / "step_3" / "weights" / "__0_0.distcp"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(JobError, match=r"the checkpoint .*step_3 is damaged: weights/__0_0.distcp has"):
        export.export(asking(run, "adapter"), str(copy / "checkpoints" / "step_3"))
    with pytest.raises(JobError, match="there is no checkpoint in "):
        export.export(asking(run, "adapter"), str(copy))


@pytest.fixture
def older(runs: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Trained]:
    """A run in a stage of its own, whose converted checkpoint an older ftgen made."""

    def copy(name: str) -> Trained:
        run = runs[name]
        stage = environment(tmp_path, monkeypatch)
        if CASES[name].base:
            shutil.copytree(run.directory.parent / CASES[name].base, stage / CASES[name].base)
        place = Path("HF_ckpt", "models", run.plan["checkpoint"]["place"])
        shutil.copytree(run.directory.parent / place, stage / place)
        shutil.copytree(run.directory / "checkpoints", stage / "run" / "checkpoints")
        shutil.rmtree(stage / place / base.FOLDER)
        origin = convert.origin(run.plan)
        (stage / place / "manifest.json").unlink()
        manifest.write(stage / place, convert.source(run.plan), origin)
        return run._replace(directory=stage / "run")

    return copy


def test_the_files_of_a_base_that_was_converted_long_ago_come_from_its_directory(
    older: Callable[[str], Trained],
) -> None:
    run = older("mistral, LoRA of queries, keys and values")
    folder = exported(run, "merged")
    assert difference(load(folder), run) < SAME
    assert not (folder / "from").exists()


def test_without_the_files_of_the_base_there_is_a_hint(older: Callable[[str], Trained]) -> None:
    run = older("llama, SFT")
    with pytest.raises(JobError, match="an older ftgen converted this checkpoint") as caught:
        exported(run, "merged")
    assert "convert it again: bash <script>.sh --convert" in caught.value.hint


def test_a_missing_base_is_an_error_before_anything_is_written(older: Callable[[str], Trained]) -> None:
    run = older("mistral, LoRA of queries, keys and values")
    shutil.rmtree(convert.directory(run.plan))
    with pytest.raises(JobError, match="the converted checkpoint is not in"):
        exported(run, "merged")


# --- the script


def test_the_script_exports_after_the_training_and_by_hand(tmp_path: Path) -> None:
    alone, out = tmp_path / "alone", tmp_path / "out"
    alone.mkdir()
    sets = ["save.every_steps=4", "max_steps=4", "window.last_steps=2", "scheme=lora", 'export.what=["merged", "adapter"]']
    command = [sys.executable, "-m", "ftgen", "compile", "specs/quickstart.toml", "--out", out]
    root = Path(__file__).parents[2]
    subprocess.run([*command, *(word for text in sets for word in ("--set", text))], cwd=root, check=True)
    script = shutil.copy(out / "quickstart.sh", alone)
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(alone),
        "HF_TOKEN": "hf_secret",
    }

    def run(*arguments: str) -> str:
        done = subprocess.run(
            ["bash", script, *arguments],
            cwd=alone,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        return done.stdout

    assert "ftgen: the export is ready: " in run()
    (made,) = alone.glob("logs/experiments/*/*/*/exports/step_4")
    assert {path.name for path in made.iterdir() if not path.name.startswith(".")} == {"merged", "adapter"}
    assert run("--export").count("ftgen: the export exists: ") == 2
    shutil.rmtree(made)
    assert run("--export", str(made.parents[1])).count("ftgen: the export is ready: ") == 2
    assert not [path for path in made.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
