"""What reads and writes weights without a framework: safetensors, distributed checkpoints, and how much memory is left."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint

from runtime.job import memory
from runtime.job.errors import JobError
from runtime.weights import base, distributed, hub, shards
from runtime.weights.shards import Entry


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "b": torch.randn(3, 5, generator=generator).bfloat16(),
        "a": torch.randn(7, generator=generator),
        "c": torch.randn(2, 2, 2, generator=generator).half(),
    }


def layout(files: dict[str, str]) -> dict[str, Entry]:
    known = tensors()
    return {
        name: Entry(shards.header_name(known[name].dtype), tuple(known[name].shape), file) for name, file in files.items()
    }


# --- safetensors


def test_what_is_written_one_tensor_at_a_time_is_what_safetensors_reads(tmp_path: Path) -> None:
    made = layout({"b": "model-1.safetensors", "a": "model-1.safetensors", "c": "model-2.safetensors"})
    shards.write(tmp_path, made, lambda name: tensors()[name])
    found = load_file(tmp_path / "model-1.safetensors") | load_file(tmp_path / "model-2.safetensors")
    assert found.keys() == made.keys()
    assert all(found[name].equal(tensors()[name]) and found[name].dtype == tensors()[name].dtype for name in found)
    assert shards.entries(tmp_path, shards.files_of(tmp_path)) == made
    index = json.loads((tmp_path / shards.INDEX).read_text())
    assert index == {
        "metadata": {"total_size": 15 * 2 + 7 * 4 + 8 * 2},
        "weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"},
    }
    with safe_open(tmp_path / "model-1.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    shards.write(tmp_path, layout({"a": shards.SINGLE}), lambda name: tensors()[name])
    assert [path.name for path in tmp_path.iterdir()] == [shards.SINGLE]
    assert shards.files_of(tmp_path) == [shards.SINGLE]


@pytest.mark.parametrize(
    ("tensor", "error"),
    [
        (torch.zeros(8), r"a is torch.float32 \[8\], but the base has F32 \[7\]"),
        (torch.zeros(7).half(), r"a is torch.float16 \[7\], but the base has F32 \[7\]"),
        (torch.tensor([0.0, float("nan"), 0, 0, 0, 0, 0]), "a has values that are no numbers"),
        (torch.tensor([0.0, float("inf"), 0, 0, 0, 0, 0]), "a has values that are no numbers"),
    ],
)
def test_a_tensor_that_does_not_fit_is_not_written(tensor: torch.Tensor, error: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=error):
        shards.write(tmp_path, layout({"a": shards.SINGLE}), lambda _: tensor)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda _: b"", lambda _: b"\xff" * 40])
def test_a_damaged_file_is_noticed_before_it_is_converted(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file(tensors(), model / shards.SINGLE)
    file = model / shards.SINGLE
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(JobError, match="are damaged"):
        base.keep(model, tmp_path / "kept")


def test_the_small_files_of_a_base_are_kept_as_files(tmp_path: Path) -> None:
    blobs, model = tmp_path / "blobs", tmp_path / "model"
    blobs.mkdir()
    model.mkdir()
    names = ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "added_tokens.json"]
    for name in names:
        (blobs / name).write_text(name)
        (model / name).symlink_to(blobs / name)  # as in the hub's cache
    (model / "README.md").write_text("of the base")
    (model / "original").mkdir()
    save_file(tensors(), model / shards.SINGLE)
    base.keep(model, tmp_path / "kept")
    kept = {path.name: path for path in (tmp_path / "kept").iterdir()}
    assert kept.keys() == {*names, base.TENSORS}
    assert not any(path.is_symlink() for path in kept.values())
    assert {name: (it.dtype, it.shape) for name, it in base.tensors(tmp_path / "kept").items()} == {
        "a": ("F32", (7,)),
        "b": ("BF16", (3, 5)),
        "c": ("F16", (2, 2, 2)),
    }


def test_all_that_is_kept_is_downloaded() -> None:
    assert set(base.SMALL) < set(hub.WANTED)


# --- distributed checkpoints


def save(folder: Path, **saved: Any) -> Path:
    checkpoint.save(saved, checkpoint_id=folder, no_dist=True)
    return folder


def test_tensors_and_their_rows_are_read_without_optimizer_states(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 3, 2)
    named = {"module.decoder.weight": whole, "optimizer.state.exp_avg.module.decoder.weight": whole, "module.x": whole[0]}
    found = distributed.Checkpoint(save(tmp_path / "weights", **named, step=3))
    assert found.names == {"decoder.weight", "x"}
    assert found.shape("decoder.weight") == (4, 3, 2)
    assert found.read("decoder.weight").equal(whole)
    assert found.read("decoder.weight", 2).equal(whole[2])


def change_metadata(folder: Path, change: Callable[[Any], Any]) -> None:
    file = folder / distributed.METADATA
    file.write_bytes(pickle.dumps(change(pickle.loads(file.read_bytes()))))  # noqa: S301 - made above


def test_a_part_that_is_missing_is_an_error(tmp_path: Path) -> None:
    folder = save(tmp_path / "weights", x=torch.ones(4, 3))

    def without_chunks(metadata: Any) -> Any:
        metadata.state_dict_metadata["x"].chunks.clear()
        return metadata

    change_metadata(folder, without_chunks)
    with pytest.raises(JobError, match="x is not complete"):
        distributed.Checkpoint(folder).read("x")


def test_the_classes_of_other_packages_are_not_imported(tmp_path: Path) -> None:
    folder = save(tmp_path / "weights", x=torch.ones(4, 3))
    file = folder / distributed.METADATA
    text = file.read_bytes()
    # the metadata also has an object of a class that nobody can import
    pickled = b"cnowhere.to.be.found\nPlan\n(tR}(X\x01\x00\x00\x00aK\x01ub0"
    file.write_bytes(text[:2] + pickled + text[2:])
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(file.read_bytes())  # noqa: S301 - made above
    assert distributed.Checkpoint(folder).read("x").equal(torch.ones(4, 3))


@pytest.mark.parametrize("content", [None, b"", b"not a pickle"])
def test_what_is_no_checkpoint_is_an_error(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / distributed.METADATA).write_bytes(content)
    with pytest.raises(JobError, match="has no distributed checkpoint"):
        distributed.Checkpoint(tmp_path)


# --- memory


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal: 4096 kB\nMemAvailable: 2000 kB\n"


def test_memory_is_what_the_machine_has_where_nothing_limits_it(tmp_path: Path) -> None:
    assert memory.available(tmp_path) == 0
    assert memory.available(write(tmp_path, proc__meminfo=MEMINFO)) == 2000 << 10


@pytest.mark.parametrize("limited", ["job", "job/step"])
def test_memory_is_what_the_cgroup_of_a_job_leaves(limited: str, tmp_path: Path) -> None:
    write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/job/step\n")
    group = tmp_path / "sys/fs/cgroup" / limited
    group.mkdir(parents=True)
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("700000\n")
    assert memory.available(tmp_path) == 300000
    (group / "memory.stat").write_text("file 90\ninactive_file 100000\n")  # the kernel frees these first
    assert memory.available(tmp_path) == 400000
    (group / "memory.max").write_text("max\n")
    assert memory.available(tmp_path) == 2000 << 10


def test_memory_of_an_older_kernel(tmp_path: Path) -> None:
    write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="9:name=systemd:/\n4:cpu,memory:/slurm/job_1\n3:cpu:/x\n")
    group = tmp_path / "sys/fs/cgroup/memory/slurm/job_1"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("1000000\n")
    (group / "memory.usage_in_bytes").write_text("990000\n")
    assert memory.available(tmp_path) == 10000
