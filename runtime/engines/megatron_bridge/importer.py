"""Run Megatron-Bridge's own importer of Hugging Face checkpoints.

In: a directory in Hugging Face format. Out: a checkpoint in Megatron's distributed format.

This module imports Megatron-Bridge (10 s), so only a conversion imports it.
"""

import json
from pathlib import Path

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.training.model_load_save import temporary_distributed_context

from runtime.engines.megatron_bridge import compatibility, cpu
from runtime.job.errors import JobError


def import_directory(source: Path, output: Path) -> str:
    """Convert the Hugging Face directory `source` to `output`. Returns whose layers it was converted with.

    The weights keep their type. JobError: Megatron-Bridge does not know the type of the model.
    """
    config = json.loads((source / "config.json").read_text())
    if not AutoBridge.can_handle(str(source)):
        raise JobError(
            f"cannot convert a checkpoint of model_type {config.get('model_type')}: Megatron-Bridge does not know it",
            'use another checkpoint, or engine = "nemo"',
        )
    on_a_gpu = torch.cuda.is_available()
    compatibility.after_imports()
    cpu.stand_in()
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    with temporary_distributed_context("gloo"):  # without it, Megatron-Bridge starts NCCL
        AutoBridge.import_ckpt(str(source), str(output), torch_dtype=dtype)
    return "transformer_engine" if on_a_gpu else "local"
