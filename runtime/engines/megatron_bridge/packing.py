"""Pack examples into sequences of equal length, with Megatron-Bridge.

In: a folder of examples and a tokenizer. Out: files for Megatron-Bridge's data module.

It has the same two functions as runtime/data/packing.py has for NeMo. Both engines tokenize and pack in the same way: the
same examples and the same seed give the same packs (a test compares them).

Megatron-Bridge tokenizes one text after the other, or in forked processes, whose pool did not always end. Here all texts are
tokenized at once before it packs, and it looks them up.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.engines import no_gpu
from runtime.job.progress import timed


def index(folder: Path) -> None:
    """Write the line index of each .jsonl file. If trainings wrote it, several jobs could write one file at once."""
    from megatron.bridge.data.datasets.utils import build_index_files

    build_index_files([str(path) for path in sorted(folder.glob("*.jsonl"))], newline_int=ord("\n"), workers=1)


def pack(plan: dict[str, Any], examples: Path, tokenizer: Path, staging: Path) -> None:
    """Tokenize and pack training.jsonl and validation.jsonl into sequences of plan["seq_length"] tokens."""
    from megatron.bridge.data.builders.gpt_sft import build_gpt_sft_split
    from megatron.bridge.data.datasets import gpt_sft
    from megatron.bridge.data.packing.offline import prepare_gpt_sft_packed_data
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    asked = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tokenizer))
    asked.tokenizer_hf_no_include_special_tokens = True
    context_parallel_size = plan["parallelism"]["context_parallel_size"]
    with timed(f"packing the data into sequences of {plan['seq_length']} tokens"):
        for name in ("training", "validation"):
            known = _tokenized(examples / f"{name}.jsonl", tokenizer / "tokenizer.json")
            with no_gpu.replaced(gpt_sft, "_tokenize", _looked_up(known, gpt_sft._tokenize)):
                prepare_gpt_sft_packed_data(
                    input_path=examples / f"{name}.jsonl",
                    output_path=staging / f"{name}.idx.parquet",
                    output_metadata_path=staging / "metadata.json",
                    packed_sequence_size=plan["seq_length"],
                    tokenizer=build_tokenizer(asked),
                    max_seq_length=plan["seq_length"],
                    seed=plan["seed"],
                    pad_seq_to_mult=2 * context_parallel_size if context_parallel_size > 1 else 1,
                    num_tokenizer_workers=1,
                    dataset_builder=build_gpt_sft_split,
                )


def _tokenized(examples: Path, tokenizer: Path) -> dict[str, list[int]]:
    """The tokens of every input and output, without special tokens, by the text, which is stripped of its spaces."""
    from tokenizers import Tokenizer

    with examples.open(encoding="utf-8") as lines:
        texts = {text.strip(" ") for line in lines for text in json.loads(line).values() if isinstance(text, str)}
    known = Tokenizer.from_file(str(tokenizer))
    known.no_truncation()
    known.no_padding()
    ordered = sorted(texts)
    encoded = known.encode_batch(ordered, add_special_tokens=False)
    return {text: encoding.ids for text, encoding in zip(ordered, encoded, strict=True)}


def _looked_up(known: dict[str, list[int]], stock: Callable[[Any, str], list[int]]) -> Callable[[Any, str], list[int]]:
    """Megatron-Bridge's function that tokenizes a text, with the texts that are known already."""

    def tokenize(tokenizer: Any, text: str) -> list[int]:
        return list(known[text]) if text in known else stock(tokenizer, text)

    return tokenize
