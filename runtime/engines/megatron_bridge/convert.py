"""Convert a Hugging Face checkpoint with Megatron-Bridge. runtime/weights/checkpoint.py has what both engines share.

In: a plan. Out: $NEMO_HOME/models/<place>/{context,weights,hugging_face}. `context` has the Hugging Face files without the
weights: the config, from which a training builds the model, and the tokenizer. base.py has what an export needs.

If the converted checkpoint exists, this module does not import Megatron-Bridge.
"""

import shutil
from pathlib import Path
from typing import Any

from runtime.job.progress import timed
from runtime.weights import base, checkpoint

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
SMALL = 64 << 20  # bytes; larger files are weights, whatever their names


def convert(plan: dict[str, Any]) -> int:
    """Convert the checkpoint unless that is done; exit code 0. JobError: no access, network or disk space; wrong shape."""

    def import_weights(weights: Path, staging: Path) -> dict[str, Any]:
        base.keep(weights, staging / base.FOLDER)
        with timed("importing Megatron-Bridge"):
            from runtime.engines.megatron_bridge import compatibility

            compatibility.before_imports(plan)
            from runtime.engines.megatron_bridge import importer
        with timed(f"converting {weights}"):
            layers = importer.import_directory(weights, staging / "weights")
        copy_context(weights, staging / "context")
        return {"layers": layers} | checkpoint.versions("megatron-bridge", "megatron-core", "torch", "transformers")

    return checkpoint.convert(plan, import_weights)


def copy_context(source: Path, target: Path) -> None:
    """Copy the files of a Hugging Face directory that are not weights: the config, the tokenizer, a chat template."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHTS) and file.stat().st_size < SMALL:
            shutil.copyfile(file, target / file.name)
