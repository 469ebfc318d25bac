"""Tokens, packs and masks of examples, too long ones among them; and the batches that NeMo's own data sets make of them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chats import said, template, write_tokenizer
from stages import plan

from runtime.data import bins, order, prepare, report, store
from runtime.data.tokenizer import Tokenizer, Tokens
from runtime.data.tokens import truncated
from runtime.job.errors import JobError

pytestmark = pytest.mark.runtime
LENGTH = 128
Make = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), template("llama3"))


@pytest.fixture
def make(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Tokenizes the lines of a file; returns the plan and the folder of the tokens."""
    monkeypatch.setenv("STAGE_PATH", str(tmp_path))

    def tokenize(examples: list[Any], **data: Any) -> tuple[dict[str, Any], Path]:
        (tmp_path / "mine.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
        kind = "chat" if "messages" in examples[0] else "jsonl"
        changes = {"seq_length": LENGTH, **data.pop("changes", {})}
        packed = data.pop("packed", False)  # no spec may ask a CPU for packs
        document = plan(data={"kind": kind, "path": "mine.jsonl", **data}, **changes)
        document["data"]["packed"] = packed
        return document, prepare.tokenize(document, tokenizer)

    return tokenize


def chats(count: int, seed: int = 1) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    words = ["the river", "of", "time and", "a", "house of light"]
    questions = [" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(count)]
    answers = [" ".join(rng.choices(words, k=rng.randint(1, 8))) for _ in range(count)]
    return [said(f"user: {question}", f"assistant: {answer}") for question, answer in zip(questions, answers, strict=True)]


LONG_ANSWER = said("user: x", "assistant: " + "light " * 200)
LONG_QUESTION = said("user: " + "x " * 300, "assistant: y")


# --- inputs and outputs, as NeMo has them


PAIRS = [
    {"input": " Where is it? ", "output": " at home "},
    {"input": "naïve  spaces\n", "output": "日本"},
    {"input": "<|eot_id|> inside", "output": "a\nb"},
]


def test_an_input_and_an_output_have_the_tokens_and_the_mask_of_nemo(tmp_path: Path, tokenizer: Path) -> None:
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.llm.gpt.data.core import create_sft_dataset

    file = tmp_path / "training.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    nemo = create_sft_dataset(file, AutoTokenizer(str(tokenizer)), LENGTH, memmap_workers=1)
    ours = Tokenizer(tokenizer, None).tokens(PAIRS)
    for number, tokens in enumerate(ours):
        assert isinstance(tokens, Tokens)
        assert tokens.ids.tolist() == nemo[number]["input_ids"]
        assert tokens.trained.tolist() == [bool(one) for one in nemo[number]["loss_mask"]]


# --- too long


def test_too_long_examples_are_refused_with_their_lines_and_lengths(make: Make) -> None:
    examples = [
        *chats(40),
        LONG_ANSWER,
        *chats(3),
        LONG_QUESTION,
    ]
    with pytest.raises(JobError) as caught:
        make(examples)
    text = str(caught.value)
    assert text.startswith("2 of 45 examples have more than 128 tokens, which is seq_length; ")
    assert [place.partition(":")[0] for place in text.split("mine.jsonl:")[1:]] == ["41", "45"]
    assert 'hint: set data.too_long = "drop" or "truncate", or a seq_length of at least ' in text


def test_dropped_examples_are_counted_and_gone(make: Make) -> None:
    examples = [*chats(40), LONG_ANSWER]
    document, folder = make(examples, too_long="drop")
    counted = report.read(folder)
    assert sum(counted[split]["examples"] for split in ("training", "validation")) == 40
    assert sum(counted[split]["dropped"] for split in ("training", "validation")) == 1
    (warning,) = report.warnings(document, counted)
    assert "1 of " in warning
    assert "0 are truncated, 1 are dropped; the longest has " in warning
    assert warning.endswith("tokens (line 41)")


def test_a_conversation_loses_its_end(make: Make) -> None:
    long = [said(f"user: x{number}", "assistant: " + "light " * 200) for number in range(9)]
    _, folder = make([*long, LONG_QUESTION], too_long="truncate")
    counted = report.read(folder)
    assert counted["training"]["truncated"] + counted["validation"]["truncated"] == 9
    assert counted["training"]["dropped"] + counted["validation"]["dropped"] == 1  # no trained token is left of it
    examples = store.Examples(folder, "training")
    assert {len(examples[number].ids) for number in range(len(examples))} == {LENGTH}
    assert all(examples[number].trained[-1] for number in range(len(examples)))


def test_an_input_loses_its_end_and_the_output_stays_whole() -> None:
    tokens = Tokens(np.arange(10, dtype=np.int32), np.arange(10) >= 7, 7)
    cut = truncated(tokens, 8)
    assert cut is not None
    assert cut.ids.tolist() == [0, 1, 2, 3, 4, 7, 8, 9]
    assert cut.trained.tolist() == [False] * 5 + [True] * 3
    assert truncated(tokens, 3) is None


def test_the_recipes_own_data_is_cut_by_nemo_and_counted(tmp_path: Path, tokenizer: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("STAGE_PATH", str(tmp_path))
    document = plan(data={"kind": "synthetic", "examples": 40})
    (first, _) = report.warnings(document, report.read(prepare.tokenize(document, tokenizer)))
    lines = (prepare.fetch(document) / "training.jsonl").read_text().splitlines()
    own = Tokenizer(tokenizer, None).own
    texts = [f"{example['input']} {example['output']}" for example in map(json.loads, lines)]
    long = sum(len(own(text, add_special_tokens=False).input_ids) + 1 > LENGTH for text in texts)
    assert 0 < long < 38
    assert first.startswith(f"training: {long} of 38 examples have more than 128 tokens: NeMo cuts the end of their input")


def test_if_nothing_is_left_it_is_an_error(make: Make) -> None:
    with pytest.raises(JobError, match="no example is left for the training"):
        make([LONG_ANSWER] * 3, too_long="drop")


# --- packs


def test_packs_hold_every_example_once_and_are_nearly_full() -> None:
    rng = random.Random(1)
    lengths = [rng.randint(5, 400) for _ in range(5000)]
    packs = bins.pack(lengths, 4096, 1)
    assert sorted(number for pack in packs for number in pack) == list(range(5000))
    filled = [sum(lengths[number] for number in pack) for pack in packs]
    assert max(filled) <= 4096
    assert len(packs) == -(-sum(lengths) // 4096)  # no packing has fewer
    assert packs == bins.pack(lengths, 4096, 1) != bins.pack(lengths, 4096, 2)


def test_the_fullest_pack_that_has_room_takes_an_example() -> None:
    assert [sorted(pack) for pack in bins.pack([6, 5, 4, 3, 2], 10, 1)] == [[0, 2], [1, 3, 4]]


def test_two_examples_fill_a_pack_to_its_last_token(make: Make) -> None:
    same = [said("user: who", "assistant: a boy")] * 3  # one of them is for the validation
    _, folder = make(same)
    length = report.read(folder)["training"]["longest"]["tokens"]
    _, folder = make(same, changes={"seq_length": 2 * (length - 1)}, packed=True)
    assert (report.read(folder)["training"]["packs"], report.read(folder)["training"]["fill"]) == (1, 1.0)


def test_an_example_as_long_as_a_pack_fits(make: Make) -> None:
    _, folder = make(chats(10), changes={"seq_length": 200}, packed=True)
    longest = max(report.read(folder)[split]["longest"]["tokens"] for split in ("training", "validation"))
    _, folder = make(chats(10), changes={"seq_length": longest}, packed=True)
    assert report.read(folder)["training"]["examples"] == 9


def nemo_module(document: dict[str, Any], folder: Path, tokenizer: Path) -> Any:
    """ftgen's data module, as a training sets it up."""
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.llm.gpt.data.packed_sequence import PackedSequenceSpecs

    from runtime.engines.nemo.data import TokensDataModule

    specs, kwargs = None, {}
    if document["data"]["packed"]:
        paths = {f"packed_{name}_data_path": str(folder / f"{split}.packs.npy") for name, split in NAMES.items()}
        specs = PackedSequenceSpecs(
            packed_sequence_size=document["seq_length"], packed_metadata_path=str(folder / "metadata.json"), **paths
        )
        kwargs = {"pad_to_max_length": True}
    module = TokensDataModule(
        folder,
        seq_length=document["seq_length"],
        tokenizer=AutoTokenizer(str(tokenizer)),
        micro_batch_size=1,
        global_batch_size=4,
        seed=document["seed"],
        packed_sequence_specs=specs,
        dataset_kwargs=kwargs,
    )
    module.trainer = SimpleNamespace(max_steps=50, global_step=0)
    module.setup("fit")
    return module


NAMES = {"train": "training", "val": "validation"}


def test_a_batch_has_the_tokens_the_labels_and_the_mask_of_its_examples(make: Make, tokenizer: Path) -> None:
    document, folder = make(chats(24))
    module, examples = nemo_module(document, folder, tokenizer), store.Examples(folder, "training")
    batch = module.samples("training").collate_fn([module.samples("training")[number] for number in range(4)])
    assert batch["tokens"].shape[1] % 16 == 0
    for row in range(4):
        ids, trained, _ = examples[row]
        inputs, count = ids[:-1].tolist(), len(ids) - 1
        assert batch["tokens"][row][:count].tolist() == inputs
        assert batch["labels"][row][:count].tolist() == ids[1:].tolist()
        assert batch["loss_mask"][row][:count].tolist() == trained[1:].astype(int).tolist()
        assert batch["loss_mask"][row][count:].sum() == 0  # padding
    # by hand: what is trained of a conversation of one turn is its answer and <|eot_id|>, to the last token
    answers = [
        json.loads(line)["messages"][1]["content"] for line in (stage(folder) / "training.jsonl").read_text().splitlines()
    ]
    reader = Tokenizer(tokenizer, None)
    counts = [len(reader.own(answer, add_special_tokens=False).input_ids) + 1 for answer in answers[:4]]
    assert batch["loss_mask"].sum(dim=1).tolist() == counts


def stage(folder: Path) -> Path:
    """The folder of the examples, beside that of their tokens."""
    (found,) = folder.parent.glob("chat-[!t]*")
    return found


def test_a_pack_has_the_tokens_and_masks_of_its_examples_and_no_others(make: Make, tokenizer: Path) -> None:
    document, folder = make(chats(60), packed=True)
    module, examples = nemo_module(document, folder, tokenizer), store.Examples(folder, "training")
    data, packs = module.samples("training"), store.Packs(folder, "training")
    for number in range(len(packs)):
        batch = data.collate_fn([data[number]])
        ends = batch["cu_seqlens"][0][: batch["cu_seqlens_argmin"].item()].tolist()
        members = packs.packed[packs.packs[number] : packs.packs[number + 1]].tolist()
        for begin, member in zip(ends, members, strict=False):
            ids, trained, _ = examples[member]
            place = slice(begin, begin + len(ids) - 1)
            assert batch["tokens"][0][place].tolist() == ids[:-1].tolist()
            assert batch["labels"][0][place].tolist() == ids[1:].tolist()
            assert batch["loss_mask"][0][place].tolist() == trained[1:].astype(int).tolist()
            assert batch["position_ids"][0][place].tolist() == list(range(len(ids) - 1))
        assert batch["loss_mask"].sum().item() == sum(int(examples[member].trained[1:].sum()) for member in members)
        assert batch["tokens"].shape == (1, LENGTH)
    assert len(data) == report.read(folder)["training"]["packs"]
    assert report.read(folder)["training"]["fill"] > 0.8


def test_cuda_graphs_get_one_shape_of_boundaries(make: Make, tokenizer: Path) -> None:
    document, folder = make(chats(60), packed=True)
    module = nemo_module(document, folder, tokenizer)
    module._pad_cu_seqlens = True
    data = module.samples("training")
    assert len({tuple(data.collate_fn([data[number]])["cu_seqlens"].shape) for number in range(len(data))}) == 1


# --- the order


def test_every_epoch_has_every_sample_once_in_another_order() -> None:
    samples, seed = 40, 7
    places = [order.sample(place, samples, seed) for place in range(3 * samples)]
    epochs = [places[:samples], places[samples : 2 * samples], places[2 * samples :]]
    assert all(sorted(epoch) == list(range(samples)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != [order.sample(place, samples, seed + 1) for place in range(samples)]


def test_the_steps_of_an_epoch_hold_every_sample() -> None:
    assert [order.steps(epochs, 10, 4) for epochs in (1, 2, 3, 4)] == [3, 5, 8, 10]
    assert order.steps(1, 3, 64) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_nemos_sampler_walks_through_the_epochs_on_every_rank(make: Make, tokenizer: Path, packed: bool) -> None:
    from nemo.lightning.data import add_megatron_sampler

    document, folder = make(chats(60), packed=packed)
    module = nemo_module(document, folder, tokenizer)
    data = module.train_dataloader()
    samples = data.dataset.samples
    count = len(samples)
    for place in (0, 1, count + 1):
        expected = samples[order.sample(place, count, document["seed"])]["input_ids"]
        assert list(data.dataset[place]["input_ids"]) == list(expected)

    def read(consumed: int, rank: int) -> list[int]:
        loader = add_megatron_sampler(
            data, 1, 4, consumed_samples=consumed, dataloader_type="batch", rank=rank, world_size=2
        )
        return [order.sample(place, count, document["seed"]) for batch in loader.batch_sampler for place in batch]

    ranks = [read(0, rank) for rank in (0, 1)]
    both = [one for pair in zip(*ranks, strict=True) for one in pair]
    assert sorted(both[:count]) == sorted(both[count : 2 * count]) == list(range(count))
    resumed = [read(8, rank) for rank in (0, 1)]
    assert resumed == [rank[4:] for rank in ranks]


def test_the_recipe_trains_on_the_packs_and_its_optimizations_read_them(make: Make, tokenizer: Path) -> None:
    import fiddle
    import torch

    from runtime.engines.nemo import recipe
    from runtime.engines.nemo.data import Packs, TokensDataModule
    from runtime.engines.nemo.optimizations import short_padding
    from runtime.engines.nemo.optimizations.merge_micro_batches import merge

    document, folder = make(chats(60), packed=True)
    built = recipe.stock(document, folder)
    recipe._set_data(built, document, prepare.Files(folder, folder, None))
    module = fiddle.build(built.data)
    assert isinstance(module, TokensDataModule)
    assert (module.seq_length, module.global_batch_size, module.seed) == (LENGTH, 4, document["seed"])
    assert module.dataset_kwargs == {"pad_to_max_length": True}  # as the stock recipe has it
    module.tokenizer = nemo_module(document, folder, tokenizer).tokenizer
    module.prepare_data()
    packs = module.samples("training")
    assert isinstance(packs, Packs)
    config = SimpleNamespace(data_step_fn=next)
    short_padding.install(built.data, config)
    batch = packs.collate_fn([packs[number] for number in range(4)])
    cut = config.data_step_fn(iter([merge(batch)]))
    assert torch.equal(cut["loss_mask"].flatten(), batch["loss_mask"].flatten())
    lengths = np.diff(cut["cu_seqlens"][0][: cut["cu_seqlens_argmin"].item()].numpy())
    assert max(lengths) <= cut["max_seqlen"].item() == 64  # the longest example, to the next multiple of 64
