"""Pack examples into sequences of equal length, with Megatron-Bridge.

In: a folder of examples and a tokenizer. Out: files for Megatron-Bridge's data module.

It has the same two functions as runtime/data/packing.py has for NeMo. Both engines tokenize and pack in the same way: the
same examples and the same seed give the same packs (a test compares them).
"""

import os
from pathlib import Path
from typing import Any

from runtime.job.progress import timed


def index(folder: Path) -> None:
    """Write the line index of each .jsonl file. If trainings wrote it, several jobs could write one file at once."""
    from megatron.bridge.data.datasets.utils import build_index_files

    build_index_files([str(path) for path in sorted(folder.glob("*.jsonl"))], newline_int=ord("\n"), workers=1)


def pack(plan: dict[str, Any], examples: Path, tokenizer: Path, staging: Path) -> None:
    """Tokenize and pack training.jsonl and validation.jsonl into sequences of plan["seq_length"] tokens."""
    from megatron.bridge.data.builders.gpt_sft import build_gpt_sft_split
    from megatron.bridge.data.packing.offline import prepare_gpt_sft_packed_data
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    asked = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tokenizer))
    context_parallel_size = plan["parallelism"]["context_parallel_size"]
    with timed(f"packing the data into sequences of {plan['seq_length']} tokens"):
        for name in ("training", "validation"):
            prepare_gpt_sft_packed_data(
                input_path=examples / f"{name}.jsonl",
                output_path=staging / f"{name}.idx.parquet",
                output_metadata_path=staging / "metadata.json",
                packed_sequence_size=plan["seq_length"],
                tokenizer=build_tokenizer(asked),
                max_seq_length=plan["seq_length"],
                seed=plan["seed"],
                pad_seq_to_mult=2 * context_parallel_size if context_parallel_size > 1 else 1,
                num_tokenizer_workers=len(os.sched_getaffinity(0)),
                dataset_builder=build_gpt_sft_split,
            )
