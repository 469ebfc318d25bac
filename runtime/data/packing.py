"""Pack examples into sequences of equal length, with NeMo.

In: a folder of examples and a tokenizer. Out: files for NeMo's data module.
"""

import inspect
from pathlib import Path
from typing import Any

from runtime.job.progress import timed


def index(folder: Path) -> None:
    """Write NeMo's line index of each .jsonl file. If trainings wrote it, several jobs could write one file at once."""
    try:
        from nemo.collections.llm.gpt.data.utils import build_index_files
    except ImportError:  # before NeMo 2.2
        from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import build_index_files

    build_index_files([str(path) for path in sorted(folder.glob("*.jsonl"))], newline_int=ord("\n"), workers=1)


def pack(plan: dict[str, Any], examples: Path, tokenizer: Path, staging: Path) -> None:
    """Tokenize and pack training.jsonl and validation.jsonl into sequences of plan["seq_length"] tokens."""
    import numpy as np
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.llm.gpt.data.packed_sequence import prepare_packed_sequence_data

    known = inspect.signature(prepare_packed_sequence_data).parameters
    # NeMo 2.1 writes no metadata, and has no arguments for its dataset before 2.4
    optional = {"output_metadata_path": staging / "metadata.json", "dataset_kwargs": {"pad_to_max_length": True}}
    with timed(f"packing the data into sequences of {plan['seq_length']} tokens"):
        for name in ("training", "validation"):
            np.random.seed(plan["seed"])  # NeMo shuffles with NumPy's global generator, and leaves its own `seed` unused
            prepare_packed_sequence_data(
                input_path=examples / f"{name}.jsonl",
                output_path=staging / f"{name}.npy",
                packed_sequence_size=plan["seq_length"],
                tokenizer=AutoTokenizer(str(tokenizer)),
                max_seq_length=plan["seq_length"],
                seed=plan["seed"],
                **{key: value for key, value in optional.items() if key in known},
            )
