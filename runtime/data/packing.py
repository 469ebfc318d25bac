"""Pack examples into sequences of equal length, with NeMo.

In: a folder of examples and a tokenizer. Out: files for NeMo's data module.
"""

from pathlib import Path
from typing import Any

from runtime.job.progress import timed


def index(folder: Path) -> None:
    """Write NeMo's line index of each .jsonl file. If trainings wrote it, several jobs could write one file at once."""
    from nemo.collections.llm.gpt.data.utils import build_index_files

    build_index_files([str(path) for path in sorted(folder.glob("*.jsonl"))], newline_int=ord("\n"), workers=1)


def pack(plan: dict[str, Any], examples: Path, tokenizer: Path, staging: Path) -> None:
    """Tokenize and pack training.jsonl and validation.jsonl into sequences of plan["seq_length"] tokens."""
    import numpy as np
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.llm.gpt.data.packed_sequence import prepare_packed_sequence_data

    with timed(f"packing the data into sequences of {plan['seq_length']} tokens"):
        for name in ("training", "validation"):
            np.random.seed(plan["seed"])  # NeMo shuffles with NumPy's global generator, and leaves its own `seed` unused
            prepare_packed_sequence_data(
                input_path=examples / f"{name}.jsonl",
                output_path=staging / f"{name}.npy",
                output_metadata_path=staging / "metadata.json",
                packed_sequence_size=plan["seq_length"],
                tokenizer=AutoTokenizer(str(tokenizer)),
                max_seq_length=plan["seq_length"],
                seed=plan["seed"],
                dataset_kwargs={"pad_to_max_length": True},
            )
