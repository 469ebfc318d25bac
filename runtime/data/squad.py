"""Download SQuAD and split it, with NeMo.

In: a plan. Out: training.jsonl and validation.jsonl.
"""

from pathlib import Path
from typing import Any

from runtime.job.errors import JobError


def identity(_plan: dict[str, Any]) -> dict[str, Any]:
    """Nothing: kind and seed, which prepare.py adds, are enough."""
    return {}


def write(plan: dict[str, Any], folder: Path) -> None:
    """Download and split. JobError: the download failed."""
    from nemo.collections.llm import SquadDataModule

    try:
        SquadDataModule(dataset_root=folder, seed=plan["seed"]).prepare_data()
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise JobError(
            f"SQuAD cannot be downloaded: {reason}", 'set data.kind = "synthetic" in the spec: it needs no network'
        ) from error
