"""Megatron-Bridge on the CPU, in .venv-bridge, which `make bridge` makes; beside it NeMo, in the tests' own environment.

No spec may pack its data on a CPU, because Megatron-Core's own attention cannot take packs. Here it can: see
runtime/engines/packed_attention.py.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bridge import ONE_THREAD, PYTHON, Run, bridge_stage, losses, train
from bridge import bridge_plan as any_plan
from stages import Stage, plan

pytestmark = pytest.mark.runtime
ROOT = Path(__file__).parents[2]
RUN: dict[str, Any] = {
    "seq_length": 512,
    "max_steps": 6,
    "data": {"kind": "synthetic", "examples": 200},
    "optimizer": {"learning_rate": 2e-3, "warmup_steps": 2},
}
LORA = {"scheme": "lora", "optimizer": {"learning_rate": 2e-2, "warmup_steps": 2}}


def bridge_plan(**changes: Any) -> dict[str, Any]:
    """A plan of 6 steps."""
    return any_plan(**RUN | changes)


def place(stage: Stage, document: dict[str, Any]) -> Path:
    return stage.home / "models" / str(document["checkpoint"]["place"])


@pytest.fixture(scope="session")
def stage(make_stage: Callable[[], Stage]) -> Stage:
    made = bridge_stage(make_stage())
    status, output = made.run(bridge_plan(), "convert", **ONE_THREAD)
    assert status == 0, output
    return made


@pytest.fixture(scope="session")
def nemo(stage: Stage) -> Stage:
    """NeMo in the same folder: its checkpoint and its data are others, made of the same weights and examples."""
    other = Stage(stage.path)
    status, output = other.run(plan(**RUN), "convert", **ONE_THREAD)
    assert status == 0, output
    return other


@pytest.fixture(scope="session")
def sft(stage: Stage) -> Run:
    return train(stage, bridge_plan(packed=True))


@pytest.fixture(scope="session")
def lora(stage: Stage) -> Run:
    return train(stage, bridge_plan(packed=True, **LORA))


# --- the check


def test_the_check_finds_nothing_missing_and_is_quick(stage: Stage) -> None:
    begin = time.monotonic()
    status, output = stage.run(bridge_plan(), "check")
    assert time.monotonic() - begin < 1.5
    packages, verdict = output.splitlines()
    assert status == 0
    assert packages.startswith("ftgen: packages: Megatron-Bridge 0.6.2 in ")
    assert "/megatron/bridge, Megatron-Core 0.19.2 in " in packages
    assert verdict == "ftgen: nothing is missing for sft_megatron_bridge_tiny_llama_fp32_1"


def test_the_check_of_each_engine_refuses_the_environment_of_the_other(stage: Stage, nemo: Stage) -> None:
    status, output = nemo.run(bridge_plan(), "check")
    assert status == 1
    assert "ftgen: error: the package megatron-bridge is not installed, only NeMo\n  hint: install Megatron-Bridge" in output
    status, output = stage.run(plan(), "check")
    assert status == 1
    assert "ftgen: error: the package nemo_toolkit is not installed, only Megatron-Bridge\n" in output


@pytest.mark.parametrize(
    ("removed", "error"),
    [
        ("data/packing/offline.py", "has no prepare_gpt_sft_packed_data; versions 0.6.0 and later have it"),
        ("recipes/llama/h100/llama3.py", "has no recipe llama3_8b, which this model needs"),
    ],
)
def test_the_check_names_what_another_version_lacks(removed: str, error: str, stage: Stage, tmp_path: Path) -> None:
    (installed,) = PYTHON.parent.parent.glob("lib/python3*/site-packages/megatron")
    shutil.copytree(installed / "bridge", tmp_path / "megatron/bridge")
    (tmp_path / "megatron/core").symlink_to(installed / "core")
    (tmp_path / "megatron/bridge" / removed).unlink()
    status, output = stage.run(bridge_plan(), "check", PYTHONPATH=str(tmp_path))
    assert status == 1
    assert error in output


# --- the checkpoint


def test_each_engine_has_a_checkpoint_of_its_own(stage: Stage, nemo: Stage) -> None:
    places = [place(stage, bridge_plan()), place(nemo, plan(**RUN))]
    kinds = [json.loads((each / "manifest.json").read_text())["source"]["kind"] for each in places]
    assert kinds == ["megatron_bridge checkpoint", "nemo checkpoint"]
    assert {path.name for path in places[0].iterdir()} == {"context", "weights", "hugging_face", "manifest.json"}
    assert (places[0] / "context" / "tokenizer.json").is_file()


def test_a_conversion_that_was_done_imports_nothing(stage: Stage) -> None:
    begin = time.monotonic()
    status, output = stage.run(bridge_plan(), "convert")
    assert time.monotonic() - begin < 3
    assert status == 0
    assert output.startswith("ftgen: the converted checkpoint exists: ")
    assert stage.run(bridge_plan(), "verify")[0] == 0


EXPORT = """
import sys
from runtime.engines.megatron_bridge import compatibility
compatibility.before_imports({"gpu": {"name": "cpu"}})
from megatron.bridge import AutoBridge
from runtime.engines.megatron_bridge import cpu
cpu.stand_in()
AutoBridge.from_hf_pretrained(sys.argv[1]).export_ckpt(sys.argv[2], sys.argv[3], show_progress=False)
"""


def test_the_converted_weights_are_those_of_the_hugging_face_checkpoint(stage: Stage, tmp_path: Path) -> None:
    """Megatron-Bridge writes them back with the same bits."""
    from safetensors.torch import load_file

    from runtime.weights import random_llama

    random_llama.write(bridge_plan(), tmp_path / "before")
    weights = place(stage, bridge_plan()) / "weights"
    command = [PYTHON, "-c", EXPORT, tmp_path / "before", weights, tmp_path / "after"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (
        {key: tensor for file in (tmp_path / name).glob("*.safetensors") for key, tensor in load_file(file).items()}
        for name in ("before", "after")
    )
    assert before.keys() == after.keys()
    assert [key for key in before if not before[key].equal(after[key])] == []


# --- the same learning


@pytest.mark.parametrize(
    ("packed", "changes"), [(True, {}), (True, LORA), (False, {})], ids=["packed SFT", "packed LoRA", "SFT"]
)
def test_both_engines_learn_the_same(
    packed: bool, changes: dict[str, Any], stage: Stage, nemo: Stage, request: pytest.FixtureRequest
) -> None:
    """From the same weights, in the same order: every loss that NeMo prints, in its four digits."""
    with_nemo = plan(**RUN | changes)
    with_nemo["data"]["packed"] = packed
    mine = request.getfixturevalue("lora" if changes else "sft") if packed else train(stage, bridge_plan(**changes))
    assert [float(f"{loss:.4g}") for loss in mine.losses] == pytest.approx(train(nemo, with_nemo).losses, abs=1.1e-3)
    assert mine.losses[-1] < mine.losses[0]


PACK = """
import json, sys
from pathlib import Path
from runtime.engines.megatron_bridge import compatibility
plan, examples, tokenizer, folder = json.loads(sys.argv[1]), *map(Path, sys.argv[2:])
compatibility.before_imports(plan)
from runtime.engines.megatron_bridge import packing
packing.pack(plan, examples, tokenizer, folder)
"""


def test_both_engines_make_the_same_packs(stage: Stage, nemo: Stage, sft: Run, tmp_path: Path) -> None:
    """All of NeMo's but the last value of each loss mask, which neither engine reads.

    The tokenizer adds a special token to each text, as Llama's does, if it is asked to.
    """
    import numpy
    import pyarrow.parquet
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    from runtime.data import packing

    context = shutil.copytree(place(stage, bridge_plan()) / "context", tmp_path / "context")
    tokenizer = Tokenizer.from_file(str(context / "tokenizer.json"))
    begin = "<|begin_of_text|>"
    tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 0)])
    tokenizer.save(str(context / "tokenizer.json"))
    folders = [file.parent for file in stage.path.glob("data/*/training.jsonl")]
    examples = next(each for each in folders if "engine" in json.loads((each / "manifest.json").read_text())["source"])
    command = [PYTHON, "-c", PACK, json.dumps(bridge_plan()), examples, context, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    made = pyarrow.parquet.read_table(tmp_path / "training.idx.parquet").to_pylist()
    packing.pack(plan(**RUN), examples, context, tmp_path)
    theirs = numpy.load(tmp_path / "training.npy", allow_pickle=True)
    assert [pack["input_ids"] for pack in made] == [pack["input_ids"] for pack in theirs]
    assert [pack["seq_start_id"] for pack in made] == [pack["seq_start_id"] for pack in theirs]
    assert 0 not in {token for pack in made for token in pack["input_ids"]}
    assert "packing the data into sequences of 512 tokens: done" in sft.output


# --- trainings


def test_a_training_writes_only_where_it_may(stage: Stage, sft: Run) -> None:
    names = {path.name for path in stage.path.iterdir() if not path.name.startswith("plan-")}
    assert names <= {"HF_ckpt", "data", "run"}
    assert "ftgen: optimizations: none, the stock recipe" in sft.output.splitlines()


def test_the_log_tells_the_versions(sft: Run) -> None:
    (told,) = [line for line in sft.output.splitlines() if line.startswith("ftgen environment: ")]
    packages = json.loads(told.removeprefix("ftgen environment: "))["packages"]
    assert packages["megatron-bridge"] == "0.6.2"
    assert packages["megatron-core"] == "0.19.2"


def test_optimizations_that_need_no_gpu_change_no_loss(stage: Stage, lora: Run) -> None:
    on = ("loss_tokens_only", "scale_small_tensor", "skip_nan_check", "short_padding")
    fast = train(stage, bridge_plan(packed=True, on=on, **LORA))
    assert f"ftgen: optimizations: {', '.join(on)}" in fast.output.splitlines()
    assert fast.losses == pytest.approx(lora.losses, rel=1e-4)


def test_weight_gradients_are_accumulated_in_the_gemm_without_apex(stage: Stage, sft: Run) -> None:
    fast = train(stage, bridge_plan(packed=True, on=("fused_wgrad_accumulation",)))
    assert fast.losses == pytest.approx(sft.losses, rel=1e-4)


def test_what_the_packages_cannot_do_is_off(stage: Stage) -> None:
    run = train(stage, bridge_plan(on=("fused_cross_entropy",), max_steps=2))
    assert "ftgen: warning: the optimization fused_cross_entropy is off: " in run.output


@pytest.mark.parametrize("tensor_parallel", [1, 2], ids=["data parallel", "tensor parallel"])
def test_two_ranks_train_as_one_does(tensor_parallel: int, stage: Stage, sft: Run) -> None:
    both = bridge_plan(packed=True, gpus=2, gpus_per_node=2)
    split = {"tensor_model_parallel_size": tensor_parallel, "data_parallel_size": 2 // tensor_parallel}
    both["parallelism"] |= split  # no spec may split a model on a CPU
    ranks = [
        stage.start(
            both, "finetune", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", NODE_RANK="0", MASTER_ADDR="127.0.0.1",
            MASTER_PORT="29517", **ONE_THREAD,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert losses(outputs[1]) == pytest.approx(sft.losses, rel=1e-4)  # the last rank prints the step lines
    assert losses(outputs[0]) == []


def test_steps_are_profiled(stage: Stage) -> None:
    profile = {"tool": "pytorch", "first_step": 1, "last_step": 2}
    run = train(stage, bridge_plan(max_steps=4, window={"last_steps": 1}, profile=profile))
    file = stage.path / "run" / "profile" / "steps_1-2_rank_0.json"
    assert f"ftgen: profile: {file}" in run.output.splitlines()
    assert json.loads(file.read_text())["traceEvents"]


def test_a_users_file_is_trained_on(stage: Stage) -> None:
    (stage.path / "run").mkdir(exist_ok=True)
    (stage.path / "run" / "mine.jsonl").write_text('{"input": "one and two", "output": "three"}\n' * 40)
    data = {"kind": "jsonl", "path": "run/mine.jsonl"}
    own = train(stage, bridge_plan(data=data, max_steps=8, optimizer={"learning_rate": 1e-2, "warmup_steps": 1}))
    assert own.losses[-1] < own.losses[0] - 1  # one sentence, forty times


FAMILIES = """
import sys
from pathlib import Path
from runtime.engines.megatron_bridge import compatibility
compatibility.before_imports({"gpu": {"name": "cpu"}})
from runtime.engines.megatron_bridge import importer
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM
from runtime.weights import random_llama
folder = Path(sys.argv[1])
shape = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False)
for name, config, model in (("mistral", MistralConfig, MistralForCausalLM), ("qwen2", Qwen2Config, Qwen2ForCausalLM)):
    model(config(**shape)).save_pretrained(folder / name)
    random_llama.write_tokenizer(512, 256, folder / name)
    importer.import_directory(folder / name, folder / f"{name}_megatron")
"""


def test_a_mistral_and_a_qwen_are_converted(stage: Stage, tmp_path: Path) -> None:
    command = [stage.python, "-c", FAMILIES, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("mistral", "qwen2"):
        assert list((tmp_path / f"{name}_megatron/iter_0000000").glob("*.distcp"))
