"""Convert a Hugging Face checkpoint with NeMo's own importer. runtime/weights/checkpoint.py has what both engines share.

In: a plan. Out: $NEMO_HOME/models/<place>/{context,weights,hugging_face}.

If the converted checkpoint exists, this module does not import NeMo.
"""

from pathlib import Path
from typing import Any

from runtime.engines.nemo import imports
from runtime.job.progress import timed
from runtime.weights import base, checkpoint
from runtime.weights.checkpoint import converted, directory, origin, source, user_directory, verify, weight_bytes

__all__ = ["convert", "converted", "directory", "origin", "source", "user_directory", "verify", "weight_bytes"]


def convert(plan: dict[str, Any]) -> int:
    """Convert the checkpoint unless that is done; exit code 0. JobError: no access, network or disk space; wrong shape."""
    return checkpoint.convert(plan, _import)


def _import(weights: Path, staging: Path) -> dict[str, Any]:
    base.keep(weights, staging / base.FOLDER)
    with timed("importing NeMo"):
        imports.defer()
        from runtime.engines.nemo.importer import import_directory
    with timed(f"converting {weights}"):
        layers = import_directory(weights, staging, staging / "tokenizer")
    return {"layers": layers} | checkpoint.versions("nemo_toolkit", "megatron-core", "torch", "transformers")
