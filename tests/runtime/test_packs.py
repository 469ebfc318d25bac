"""How packs are laid out, on batches that NeMo's own packed dataset makes; and how shards of FP8 weights are cast."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.data import packing
from runtime.engines.nemo.optimizations import merge_micro_batches, short_padding, skip_shard_transposes
from runtime.engines.nemo.optimizations.merge_micro_batches import merge
from runtime.engines.nemo.optimizations.packs import ChangedStep
from runtime.engines.nemo.optimizations.short_padding import cut_padding
from runtime.weights import random_llama

LENGTH, PACKS = 256, 4
pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Eight packs; the last holds two short examples, and is mostly padding."""
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.llm.gpt.data.core import create_sft_dataset

    folder = tmp_path_factory.mktemp("packs")
    random_llama.write_tokenizer(300, LENGTH, folder)
    rng = random.Random(1)
    lengths = [[rng.randint(20, 40) for _ in range(6)] for _ in range(7)] + [[20, 30]]
    rows = [_pack(row, rng) for row in lengths]
    np.save(folder / "training.npy", np.array(rows, dtype=object), allow_pickle=True)
    metadata = {
        "dataset_max_seqlen": 40,
        "max_samples_per_bin": 6,
        "min_packed_seqlen": min(map(sum, lengths)),
        "pack_size": LENGTH,
    }
    (folder / "metadata.json").write_text(json.dumps([metadata]))
    return create_sft_dataset(
        folder / "training.npy",
        AutoTokenizer(str(folder)),
        LENGTH,
        pad_cu_seqlens=True,
        pack_metadata_file_path=str(folder / "metadata.json"),
        pad_to_max_length=True,
    )


def _pack(lengths: list[int], rng: random.Random) -> dict[str, list[int]]:
    answers = [rng.randint(1, 6) for _ in lengths]
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return {
        "input_ids": [rng.randrange(2, 300) for _ in range(sum(lengths))],
        "seq_start_id": starts,
        "loss_mask": [
            int(place >= length - answer) for length, answer in zip(lengths, answers, strict=True) for place in range(length)
        ],
    }


def batch(dataset: Any, *numbers: int) -> dict[str, Any]:
    made: dict[str, Any] = dataset.collate_fn([dataset[number] for number in numbers])
    return made


def ends(batch: dict[str, Any], row: int = 0) -> list[int]:
    found: list[int] = batch["cu_seqlens"][row][: batch["cu_seqlens_argmin"][row].item()].tolist()
    return found


def test_the_padding_is_cut_and_the_examples_are_not(dataset: Any) -> None:
    for number in range(8):
        before = batch(dataset, number)
        after = cut_padding(before, 64)
        lengths = np.diff(ends(after))
        assert lengths.max() <= 64
        assert set(ends(before)) <= set(ends(after))
        assert (ends(after)[0], ends(after)[-1]) == (0, LENGTH)
        assert after["max_seqlen"].item() == 64 < before["max_seqlen"].item()
        assert all(after[key] is before[key] for key in ("tokens", "labels", "loss_mask", "position_ids"))


def test_every_batch_has_one_shape_as_graphs_want_it(dataset: Any) -> None:
    for change in (lambda one: cut_padding(one, 64), merge, lambda one: cut_padding(merge(one), 64)):
        numbers = [(number,) for number in range(8)] if change is not merge else [(0, 1, 2, 3), (4, 5, 6, 7)]
        shapes = {tuple(change(batch(dataset, *some))["cu_seqlens"].shape) for some in numbers}
        assert len(shapes) == 1


def test_merged_packs_hold_the_same_tokens_and_examples(dataset: Any) -> None:
    before = batch(dataset, 4, 5, 6, 7)
    after = merge(before)
    for key in ("tokens", "labels", "loss_mask", "position_ids"):
        assert after[key].shape == (1, PACKS * LENGTH)
        assert after[key].reshape(PACKS, LENGTH).equal(before[key])
    assert set(ends(after)) == {row * LENGTH + end for row in range(PACKS) for end in ends(before, row)}
    assert ends(after) == sorted(ends(after))


def test_merged_packs_have_the_gradient_of_the_packs_one_by_one(dataset: Any) -> None:
    import torch
    from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

    before = batch(dataset, 4, 5, 6, 7)
    counts = before["loss_mask"].sum(dim=1)
    assert len(set(counts.tolist())) > 1  # else a mean over all tokens would do
    losses = torch.rand(PACKS, LENGTH, requires_grad=True)
    reduction = MaskedTokenLossReduction()
    means = []
    for row in range(PACKS):
        total, tokens, _ = reduction.forward({"loss_mask": before["loss_mask"][row]}, losses[row])
        means.append(total / tokens)
    (stock,) = torch.autograd.grad(sum(means) / PACKS, losses)

    merged = losses.detach().reshape(1, -1).requires_grad_()
    after = merge(before)
    total, tokens, logged = merge_micro_batches._weighted(MaskedTokenLossReduction.forward)(reduction, after, merged)
    (ours,) = torch.autograd.grad(total / tokens, merged)
    torch.testing.assert_close(ours.reshape(PACKS, LENGTH), stock)
    mean = (losses * before["loss_mask"]).sum() / counts.sum()
    torch.testing.assert_close(logged["loss_sum_and_ub_size"], torch.stack([mean * counts.sum(), counts.sum()]).detach())


def test_steps_that_change_batches_can_be_stacked(dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self)
    known = ("tokens", "loss_mask", "cu_seqlens", "cu_seqlens_argmin")

    def stock(iterator: Any) -> dict[str, Any]:
        read = next(iterator)
        return {key: read[key] if key in known else None for key in read}  # as NeMo's step does

    inner = ChangedStep(stock, lambda one: cut_padding(one, 64))
    step = ChangedStep(inner, merge)(iter([(batch(dataset, 0, 1, 2, 7), 0, 0)]))
    assert step["tokens"].shape == step["loss_weights"].shape == (1, PACKS * LENGTH)
    assert np.diff(ends(step)).max() <= 64


def test_nemos_packs_depend_only_on_the_data_and_the_seed(tmp_path: Path) -> None:
    random_llama.write_tokenizer(300, LENGTH, tmp_path)
    for name, count in (("training", 60), ("validation", 5)):
        lines = [json.dumps({"input": "a " * (number % 9 + 1), "output": f"b {number}"}) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def packed(seed: int, place: str) -> bytes:
        np.random.seed(len(place))
        (tmp_path / place).mkdir()
        packing.pack({"seq_length": 128, "seed": seed}, tmp_path, tmp_path, tmp_path / place)
        return (tmp_path / place / "training.npy").read_bytes()

    assert packed(1, "first") == packed(1, "second") != packed(2, "other")


def test_the_longest_example_comes_from_the_packs_metadata(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps([{"dataset_max_seqlen": 395}, {"dataset_max_seqlen": 331}]))
    data = SimpleNamespace(packed_sequence_specs=SimpleNamespace(packed_metadata_path=tmp_path / "metadata.json"))
    config = SimpleNamespace(data_step_fn=next)
    short_padding.install(data, config)
    import torch

    one = {"cu_seqlens": torch.tensor([[0, 300, 4096, -1]]), "cu_seqlens_argmin": torch.tensor([[3]])}
    assert config.data_step_fn(iter([one]))["max_seqlen"].item() == 448  # the next multiple of 64


def test_shards_are_cast_without_transposes_and_the_weights_keep_theirs() -> None:
    class Quantizer:
        def __init__(self, columnwise_usage: bool) -> None:
            self.columnwise_usage = columnwise_usage

        def set_usage(self, columnwise: bool) -> None:
            self.columnwise_usage = columnwise

    quantizers = [Quantizer(True), Quantizer(False)]
    weights = [(SimpleNamespace(_get_quantizer=lambda own=own: own), None, 0, None) for own in quantizers]
    seen = []
    cast = skip_shard_transposes._without_transposes(
        lambda _given, _group: seen.append([own.columnwise_usage for own in quantizers])
    )
    cast(weights, "group")
    assert seen == [[False, False]]
    assert [own.columnwise_usage for own in quantizers] == [True, False]
