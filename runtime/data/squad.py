"""Download SQuAD and split it, with NeMo.

In: a plan. Out: training.jsonl and validation.jsonl.
"""

from pathlib import Path
from typing import Any

from runtime.hub.fetch import fetch
from runtime.hub.repository import Repository

FILES = {"train": "plain_text/train-*.parquet", "validation": "plain_text/validation-*.parquet"}
SQUAD = Repository("rajpurkar/squad", "dataset", "main", tuple(FILES.values()), tuple(FILES.values()))


def identity(_plan: dict[str, Any]) -> dict[str, Any]:
    """Nothing: kind and seed, which prepare.py adds, are enough."""
    return {}


def repositories(_plan: dict[str, Any]) -> list[Repository]:
    """What `write` reads from the hub."""
    return [SQUAD]


def write(plan: dict[str, Any], folder: Path) -> None:
    """Download, unless that is done, and split as NeMo's SQuAD module does. JobError: the download failed."""
    from datasets import load_dataset
    from nemo.collections.llm import SquadDataModule

    source = fetch(SQUAD, plan["name"])
    files = {split: [str(path) for path in sorted(source.glob(pattern))] for split, pattern in FILES.items()}
    examples = load_dataset("parquet", data_files=files, cache_dir=str(folder / "cache"))
    SquadDataModule(dataset_root=folder, seed=plan["seed"])._preprocess_and_split_data(examples)
