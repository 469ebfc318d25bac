"""The tiny model with the NeMo and Megatron-Core of each image: `make sets` installs them, in .venv-sets/."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from stages import Stage, plan

ROOT = Path(__file__).parent.parent.parent
SETS = Path(__file__).with_name("sets")
OLDER_TORCH = {"PYTHONPATH": str(SETS / "older_torch")}
PINNED = "pinned"  # ftgen's own set
NAMES = [*sorted(path.stem for path in SETS.glob("[0-9]*.txt")), PINNED]
SFT = {"max_steps": 8, "optimizer": {"learning_rate": 5e-3, "warmup_steps": 1}}
LORA = {"scheme": "lora", "max_steps": 4, "optimizer": {"learning_rate": 5e-2, "warmup_steps": 1}}
# Of those that need no GPU, and one that needs Transformer Engine. No spec may ask a CPU for them.
OPTIMIZATIONS = ("loss_tokens_only", "loss_tokens_in_last_layer", "scale_small_tensor", "skip_nan_check", "fused_swiglu")
# Printed by NeMo 2.4 and later. Before, the loss was the mean of the packs' mean losses, not of all tokens.
SFT_LOSSES = [6.22, 5.994, 5.623, 4.874, 4.531, 5.198, 5.238, 4.227]
LORA_LOSSES = [6.22, 6.098, 6.322, 5.915]
EARLIER_SFT_LOSSES = [6.262, 5.996, 5.424, 4.578, 4.28, 4.631, 5.087, 4.013]
EARLIER_LORA_LOSSES = [6.262, 6.104, 6.313, 5.885]
EARLIER = {"2.1.0", "2.2.1", "2.3.2"}
UNTESTED = {*EARLIER, "2.4.0", "2.5.0", "2.6.0"}
# What the packages of a set lack. Transformer Engine is in no set here.
NO_GRAPHS = "NeMo's Llama3Config8B has no cuda_graph_impl"
NO_POSTPROCESS = dict.fromkeys(
    ("loss_tokens_only", "loss_tokens_in_last_layer"), "megatron.core.models.gpt has no GPTModel._postprocess"
)
NO_TRANSFORMER_ENGINE = {"cuda_graphs", "fused_cross_entropy", "fused_swiglu", "fused_residual_add", "async_step"}  # in FP8
NO_TRITON = {"fused_rotary", "short_attention", "fp8_swiglu"}
LACKING = {
    "2.1.0": {
        "cuda_graphs": NO_GRAPHS,
        **NO_POSTPROCESS,
        "scale_small_tensor": "nemo.collections.llm.peft.utils has no ParallelLinearAdapter.forward",
        "short_padding": "nemo.collections.llm.gpt.data.packed_sequence has no PackedSequenceSpecs.packed_metadata_path",
    },
    "2.2.1": {"cuda_graphs": NO_GRAPHS, **NO_POSTPROCESS},
    "2.3.2": {"cuda_graphs": NO_GRAPHS, **NO_POSTPROCESS},
    "2.4.0": {"cuda_graphs": NO_GRAPHS},
    "2.5.0": {"cuda_graphs": NO_GRAPHS},
}
pytestmark = pytest.mark.runtime


class Run(NamedTuple):
    """What a set did, by command."""

    name: str
    stage: Stage
    outputs: dict[str, tuple[int, str]]


def python(name: str) -> Path:
    path = Path(sys.executable) if name == PINNED else ROOT / ".venv-sets" / name / "bin" / "python"
    assert path.exists(), f"{path} does not exist: run make sets"
    return path


@pytest.fixture(scope="module", params=NAMES)
def run(request: pytest.FixtureRequest, make_stage: Callable[[], Stage]) -> Run:
    stage = Stage(make_stage().path, python(request.param))
    adapters = plan(**LORA)
    adapters["optimizations"] = {name: name in OPTIMIZATIONS for name in adapters["optimizations"]}
    fine_tune = plan(save={"every_steps": 4}, epochs=1, max_steps=None)
    plans = {"check": plan(), "fine_tune": fine_tune, "convert": plan(), "sft": plan(**SFT), "lora": adapters}
    commands = {"check": "check", "fine_tune": "check", "convert": "convert", "sft": "finetune", "lora": "finetune"}
    return Run(request.param, stage, {key: stage.run(plans[key], commands[key], **OLDER_TORCH) for key in plans})


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^Training epoch .* reduced_train_loss: (\S+)", output, re.MULTILINE)]


def test_the_check_finds_nothing_missing(run: Run) -> None:
    status, output = run.outputs["check"]
    assert (status, output.splitlines()[-1]) == (0, "ftgen: nothing is missing for sft_nemo_tiny_llama_fp32_1"), output


def test_a_fine_tune_that_delivers_a_model_is_refused_where_it_was_not_tested(run: Run) -> None:
    status, output = run.outputs["fine_tune"]
    if run.name in UNTESTED:
        assert status == 1
        assert f"ftgen: error: not tested with NeMo {run.name}: [save], data that ftgen packs and orders\n" in output
    else:
        assert status == 0, output


def test_the_tiny_model_is_converted(run: Run) -> None:
    status, output = run.outputs["convert"]
    assert status == 0, output
    assert {path.name for path in run.stage.place.iterdir()} == {"context", "weights", "hugging_face", "manifest.json"}


def test_every_weight_is_trained_with_the_same_losses(run: Run) -> None:
    status, output = run.outputs["sft"]
    assert status == 0, output
    assert "ftgen: optimizations: none, the stock recipe" in output.splitlines()
    assert losses(output) == pytest.approx(EARLIER_SFT_LOSSES if run.name in EARLIER else SFT_LOSSES, rel=1e-3)


def test_adapters_are_trained_with_the_same_losses(run: Run) -> None:
    """With optimizations: those that the set lacks are off, the others change no loss."""
    status, output = run.outputs["lora"]
    assert status == 0, output
    assert losses(output) == pytest.approx(EARLIER_LORA_LOSSES if run.name in EARLIER else LORA_LOSSES, rel=1e-3)
    lacking = {"fused_swiglu", *LACKING.get(run.name, {})} & set(OPTIMIZATIONS)
    (told,) = [line for line in output.splitlines() if line.startswith("ftgen environment: ")]
    assert set(json.loads(told.removeprefix("ftgen environment: "))["optimizations_off"]) == lacking
    on = ", ".join(name for name in OPTIMIZATIONS if name not in lacking)
    assert f"ftgen: optimizations: {on}" in output.splitlines()
    for name in lacking:
        assert f"ftgen: warning: the optimization {name} is off: " in output


def test_the_recipe_for_gpus_is_built_and_its_data_are_packed(run: Run) -> None:
    asked = plan(
        model="llama3_8b", scheme="lora", precision="fp8", gpu="h100", gpus=8, seq_length=4096, global_batch_size=32,
        data={"kind": "synthetic", "examples": 120}, optimizer={}, window={}, max_steps=20, checkpoint={"source": "random"},
    )  # fmt: skip
    file = run.stage.path / "gpu.json"
    file.write_text(json.dumps(asked))
    done = subprocess.run(
        [python(run.name), Path(__file__).with_name("gpu_recipe.py"), file],
        env=os.environ | OLDER_TORCH | {"STAGE_PATH": str(run.stage.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    lacking = LACKING.get(run.name, {})
    assert set(found["off"]) == set(lacking) | NO_TRANSFORMER_ENGINE | NO_TRITON
    assert lacking.items() <= found["off"].items()
    assert sum(found["lengths"]) == 4096
    if "short_padding" not in lacking:
        assert max(found["lengths"]) < 700  # the longest example


def test_the_check_refuses_what_cannot_be_imported(stage: Stage, tmp_path: Path) -> None:
    """NeMo 2.7 with an earlier Megatron-Core, as sources before the installed one."""
    (earlier,) = (ROOT / ".venv-sets" / "2.5.0").glob("lib/python3*/site-packages/megatron")
    (tmp_path / "megatron").symlink_to(earlier)
    path = {"PYTHONPATH": str(tmp_path)}
    status, output = stage.run(plan(), "check", **path)
    assert status == 1
    assert f"does not fit Megatron-Core 0.14.0 in {tmp_path}/megatron/core, which lacks " in output
    assert "lacks megatron.core.process_groups_config.ProcessGroupCollection\n" in output
    done = subprocess.run(
        [sys.executable, "-c", "import nemo.collections.llm"],
        env=os.environ | path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ImportError: cannot import name 'ProcessGroupCollection'" in done.stderr


@pytest.mark.parametrize("name", [name for name in NAMES if name != PINNED])
def test_a_set_has_the_versions_of_its_file(name: str) -> None:
    """And not those of the environment below it."""
    wanted = dict(line.split("==") for line in (SETS / f"{name}.txt").read_text().splitlines() if line[:1] != "#")
    ask = "import importlib.metadata as m, importlib.util as u, sys; print(u.find_spec('nemo').origin)"
    ask += "; print(u.find_spec('megatron.core').origin); print([m.version(name) for name in sys.argv[1:]])"
    done = subprocess.run([python(name), "-c", ask, *wanted], capture_output=True, text=True, check=True)
    nemo, megatron, versions = done.stdout.splitlines()
    folder = ROOT / ".venv-sets" / name
    assert [folder in Path(place).parents for place in (nemo, megatron)] == [True, True]
    assert versions == str(list(wanted.values()))
