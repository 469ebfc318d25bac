"""What the runtime does without NeMo: checks, refusals, made-up text, tokenizers and a user's data."""

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from stages import Stage, plan

from runtime.data import jsonl, synthetic_text
from runtime.data.split import split
from runtime.job.errors import JobError
from runtime.weights import random_llama, read_ahead


def rng(seed: int) -> random.Random:
    return random.Random(seed)


# --- check


def test_check_finds_nothing_missing_and_is_quick(stage: Stage) -> None:
    begin = time.monotonic()
    status, output = stage.run(plan(), "check")
    assert time.monotonic() - begin < 1.5
    assert status == 0
    packages, verdict = output.splitlines()
    assert packages.startswith("ftgen: packages: NeMo 2.7.3 in ")
    assert "/nemo, Megatron-Core 0.15.3 in " in packages
    assert verdict == "ftgen: nothing is missing for sft_nemo_tiny_llama_fp32_1"


def test_check_says_all_that_is_missing_at_once(stage: Stage) -> None:
    needy = plan(
        model="llama3_8b", gpu="h100", precision="bf16", gpus=8, global_batch_size=32,
        data={"kind": "jsonl", "path": "none.jsonl"},
    )  # fmt: skip
    status, output = stage.run(needy, "check", STAGE_PATH="/nowhere", CUDA_VISIBLE_DEVICES="0,1", HOME=str(stage.path))
    assert status == 1
    errors = [line for line in output.splitlines() if line.startswith("ftgen: error: ")]
    assert len(errors) == len([line for line in output.splitlines() if line.startswith("  hint: ")])
    for expected in (
        "STAGE_PATH: the folder /nowhere does not exist on this machine",
        "meta-llama/Meta-Llama-3-8B is gated, and there is no Hugging Face token",
        "data.path: the file /nowhere/none.jsonl does not exist or cannot be read",
        "the plan needs 8 GPUs on each node, but this process can use only 2",
    ):
        assert f"ftgen: error: {expected}" in errors


def test_check_sees_a_token_in_the_environment_or_in_a_file(stage: Stage) -> None:
    gated = plan(model="llama3_8b")
    file = stage.path / "token"
    file.write_text("hf_secret_of_a_file")
    assert "no Hugging Face token" in stage.run(gated, "check")[1]
    exported = {"HF_TOKEN": "hf_secret"}
    assert "no Hugging Face token" not in stage.run(gated, "check", **exported)[1]
    status, output = stage.run(gated, "check", HF_TOKEN_PATH=str(file))
    assert status == 0
    assert "hf_secret" not in output


VERSION = "MAJOR = {}\nMINOR = {}\nPATCH = {}\nPRE_RELEASE = ''\n"


def sources(folder: Path, package: str, version: str, files: dict[str, str]) -> str:
    """A folder with a package's files, as [sources] of a spec puts it before the installed ones on sys.path."""
    place = folder / package
    own = {"__init__.py": "", "package_info.py": VERSION.format(*version.split("."))}
    for name, text in (own | files).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("package", "version", "files", "error"),
    [
        ("nemo", "3.0.0", {}, "NeMo 3.0.0 in {}/nemo has no nemo.collections.llm; versions 2.1 to 2.7 have it"),
        (
            "nemo",
            "2.6.0",
            {"collections/llm/__init__.py": ""},
            "NeMo 2.6.0 in {}/nemo has no recipe llama3_8b, which this model needs",
        ),
        (
            "megatron/core",
            "0.14.0",
            {},
            "does not fit Megatron-Core 0.14.0 in {}/megatron/core, which lacks megatron.core.",
        ),
    ],
)
def test_check_looks_at_what_would_be_imported(
    package: str, version: str, files: dict[str, str], error: str, stage: Stage, tmp_path: Path
) -> None:
    """Not at what is installed: here, sources come first."""
    status, output = stage.run(plan(), "check", PYTHONPATH=sources(tmp_path, package, version, files))
    assert status == 1
    assert error.format(tmp_path) in output
    assert "  hint: install ftgen's extra runtime for " in output


def test_the_hint_of_the_check_can_be_followed_in_an_image(stage: Stage, tmp_path: Path) -> None:
    document = plan()
    document["python"] |= {"kind": "container", "image": "/images/nemo.sqsh"}
    _, output = stage.run(document, "check", PYTHONPATH=sources(tmp_path, "nemo", "3.0.0", {}))
    assert "  hint: set python.image in the site profile to another image: `ftgen list --images` says which fit" in output


def test_sources_that_have_all_names_pass_whatever_their_version(stage: Stage, tmp_path: Path) -> None:
    installed = Path(importlib.util.find_spec("megatron.core").origin).parent  # type: ignore[union-attr, arg-type]
    shutil.copytree(installed, tmp_path / "megatron/core", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "megatron/core/package_info.py").write_text(VERSION.format(0, 99, 1))
    status, output = stage.run(plan(), "check", PYTHONPATH=str(tmp_path))
    assert status == 0, output
    assert f"Megatron-Core 0.99.1 in {tmp_path}/megatron/core, " in output


def test_check_knows_a_missing_package(stage: Stage, tmp_path: Path) -> None:
    """In an environment that has nothing."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    status, output = Stage(stage.path, tmp_path / "bare/bin/python").run(plan(), "check")
    assert status == 1
    assert output.startswith("ftgen: packages: no NeMo and no PyTorch\n")
    for name in ("nemo_toolkit", "megatron-core", "torch", "lightning", "transformers"):
        assert f"ftgen: error: the package {name} is not installed\n  hint: " in output


@pytest.mark.parametrize(("cpus", "warned"), [("8", True), ("15(x2)", True), ("16", False), ("", False)])
def test_check_warns_of_a_part_of_a_node_with_too_few_cpus(cpus: str, warned: bool, stage: Stage) -> None:
    eight = plan(gpu="h100", precision="bf16", gpus=8, global_batch_size=32)
    _, output = stage.run(eight, "check", SLURM_JOB_CPUS_PER_NODE=cpus)
    assert ("CPUs for 8 GPUs of a node: set cpus_per_gpu in the site profile\n" in output) == warned


# --- refusals before anything heavy is imported


@pytest.mark.parametrize(
    ("changes", "command", "error"),
    [
        ({}, "finetune", "there is no converted checkpoint in "),
        ({"gpus": 2, "gpus_per_node": 2}, "finetune", "1 processes train, but the plan has 2 GPUs"),
        ({"checkpoint": {"source": "hub"}}, "convert", "HF_HUB_OFFLINE is set, and ftgen/tiny-llama is not on this machine"),
        ({"checkpoint": {"source": "directory", "path": "none"}}, "convert", "none is not a Hugging Face checkpoint"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_a_hint(changes: dict[str, Any], command: str, error: str, stage: Stage) -> None:
    status, output = stage.run(plan(**changes), command, HF_HUB_OFFLINE="1")
    assert status == 1
    said = [line for line in output.splitlines() if not line.startswith("ftgen: downloading")]
    assert len(said) == 2, output
    assert said[0].startswith("ftgen: error: ")
    assert error in said[0]
    assert said[1].startswith("  hint: ")
    assert not list(stage.path.rglob(".*.staging-*"))


@pytest.mark.parametrize("path", ["~/here/x.jsonl", "$HOME/here/x.jsonl", "${WHERE}/x.jsonl", "here/x.jsonl"])
def test_a_path_of_the_spec_has_its_variables_expanded_on_the_node(path: str, stage: Stage) -> None:
    (stage.path / "here").mkdir()
    (stage.path / "here/x.jsonl").write_text("")
    places = {"HOME": str(stage.path), "WHERE": str(stage.path / "here")}
    status, output = stage.run(plan(data={"kind": "jsonl", "path": path}), "check", **places)
    assert status == 0
    assert output.endswith("\nftgen: nothing is missing for sft_nemo_tiny_llama_fp32_1\n")


def test_a_path_with_a_variable_that_is_not_set_is_named(stage: Stage) -> None:
    status, output = stage.run(plan(checkpoint={"source": "directory", "path": "$NOT_THERE/x"}), "convert")
    assert status == 1
    assert "ftgen: error: checkpoint.path: $NOT_THERE/x refers to $NOT_THERE, which is not set\n  hint: export it" in output


def test_a_directory_of_another_shape_or_with_a_missing_shard_is_refused(stage: Stage) -> None:
    given = stage.path / "given"
    random_llama.write(plan(), given)
    asked = plan(checkpoint={"source": "directory", "path": "given"})
    config = json.loads((given / "config.json").read_text())
    (given / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    assert "has hidden_size = 64, but model tiny_llama has 128" in stage.run(asked, "convert")[1]
    (given / "config.json").write_text(json.dumps(config))
    (given / "model-00002-of-00003.safetensors").unlink()
    assert "files are missing: model-00002-of-00003.safetensors" in stage.run(asked, "convert")[1]


# --- made-up text and tokenizers


def test_made_up_examples_have_the_form_and_length_of_squad() -> None:
    examples = [synthetic_text.example(rng(seed)) for seed in range(300)]
    assert all(example["input"].startswith("Context: ") for example in examples)
    assert all(" Question: " in example["input"] and example["input"].endswith(" Answer:") for example in examples)
    assert all(example["output"] and example["output"] in example["input"] for example in examples)
    lengths = [len(f"{example['input']} {example['output']}".split()) for example in examples]
    assert 150 < sum(lengths) / len(lengths) < 170
    assert synthetic_text.example(rng(1)) == synthetic_text.example(rng(1)) != synthetic_text.example(rng(2))


@pytest.mark.parametrize(("vocab_size", "most"), [(512, 2.5), (128256, 1.5)])
def test_a_tokenizer_has_exactly_the_asked_entries_and_cuts_words_as_a_real_one(
    vocab_size: int, most: float, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    random_llama.write_tokenizer(vocab_size, 8192, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == vocab_size
    assert (tokenizer.token_to_id("<|begin_of_text|>"), tokenizer.token_to_id("<|end_of_text|>")) == (0, 1)
    sentences = [synthetic_text.example(rng(1000 + seed))["input"] for seed in range(50)]
    tokens = sum(len(tokenizer.encode(sentence).ids) for sentence in sentences)
    assert 1.1 < tokens / sum(len(sentence.split()) for sentence in sentences) < most
    assert tokenizer.decode(tokenizer.encode(sentences[0]).ids) == sentences[0]


def test_random_weights_are_the_seeds(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        random_llama.write(plan(seed=seed), tmp_path / name)
    a, b, c = ((tmp_path / name / "model-00002-of-00003.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_are_the_same_bytes_whatever_the_number_of_threads(dtype: str, tmp_path: Path) -> None:
    model = plan()["model"] | {"num_layers": 12}
    made = []
    for threads in (1, 2, random_llama.THREADS):
        folder = tmp_path / str(threads)
        folder.mkdir()
        random_llama._write_weights(model, dtype, 1234, folder, threads)
        made.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert len(made[0]) == 12 + 2
    assert made[0] == made[1] == made[2]


def test_one_shard_of_random_weights_can_be_made_again_by_itself(tmp_path: Path) -> None:
    random_llama.write(plan(), tmp_path / "all")
    shapes = random_llama._shards(plan()["model"])[2]
    random_llama._write_shard(shapes, tmp_path / "one", plan()["seed"] * 1000 + 2, "float32")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "all" / "model-00003-of-00003.safetensors").read_bytes()


def test_a_shard_that_cannot_be_written_is_an_error_and_not_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "model-00002-of-00003.safetensors").mkdir()
    with pytest.raises(Exception, match="directory"):
        random_llama.write(plan(), tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()


# --- reading ahead


def in_memory(path: Path) -> int:
    """Bytes of the file that are in the page cache, by util-linux."""
    asked = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not shutil.which("fincore"), reason="util-linux without fincore")
def test_the_first_rank_of_a_node_reads_the_weights_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "__0_0.distcp"
    with file.open("wb") as opened:
        opened.write(os.urandom(40 << 20))
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(file):
        pytest.skip("this file system keeps its files in memory")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert read_ahead.begin(tmp_path) is None
    monkeypatch.setenv("LOCAL_RANK", "0")
    thread = read_ahead.begin(tmp_path)
    assert thread is not None
    thread.join(60)
    assert in_memory(file) > 30 << 20  # the system may take some of it back at any time


def test_what_cannot_be_read_ahead_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for folder in (tmp_path, tmp_path / "not there"):
        thread = read_ahead.begin(folder)
        assert thread is not None
        thread.join(10)
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 42)  # a hole: larger than any memory
    assert read_ahead.begin(tmp_path) is None
    read_ahead._read([tmp_path / "gone", tmp_path])


# --- a user's file


def test_faulty_lines_are_numbered_and_all_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"input": "a", "output": "b"}\n\nnonsense\n[]\n{"input": "a"}\n{"input": " ", "output": "b"}\n')
    with pytest.raises(JobError) as caught:
        jsonl.read_jsonl(file)
    for fault in (":3: not JSON", ":4: not an object", ':5: "output" has no text', ':6: "input" has no text'):
        assert fault in caught.value.what


def test_a_file_is_split_without_losing_or_repeating_an_example(tmp_path: Path) -> None:
    examples = [{"input": f"question {number}", "output": f"answer {number}"} for number in range(100)]
    split(examples, 1, tmp_path)
    parts = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("training", "validation")
    ]
    assert [len(part) for part in parts] == [95, 5]
    assert sorted(example["input"] for part in parts for example in part) == sorted(e["input"] for e in examples)
