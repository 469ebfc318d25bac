"""Run NeMo's own importer of Hugging Face checkpoints, so that it writes only into one directory.

In: a directory in Hugging Face format. Out: a directory in NeMo's format.

This module imports NeMo (15-40 s), so only a conversion imports it.
"""

import json
import queue
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import base, filesystem_async
from nemo.collections.llm.gpt.model.llama import HFLlamaImporter
from nemo.collections.llm.gpt.model.mistral import HFMistralImporter
from nemo.collections.llm.gpt.model.qwen2 import HFQwen2Importer
from transformers import AutoTokenizer

from runtime.engines.nemo import cpu
from runtime.job import children
from runtime.job.errors import JobError

# By the `model_type` of a config.json.
IMPORTERS = {"llama": HFLlamaImporter, "mistral": HFMistralImporter, "qwen2": HFQwen2Importer}


class OneDirectory:
    """Changes two things of NeMo's importer: it uses no shared folder in /tmp, and no second process to save."""

    tokenizer_directory: Path

    def save_hf_tokenizer_assets(self, tokenizer_name_or_path: str, save_path: str = "") -> str:
        """Save the tokenizer in our own folder. NeMo copies the folder, with its name, into the checkpoint."""
        target = save_path or str(self.tokenizer_directory)
        # from_pretrained does not run code of the model's repository
        AutoTokenizer.from_pretrained(tokenizer_name_or_path).save_pretrained(target)
        return target

    def nemo_setup(self, model: Any, trainer: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Save in this process. A second process would import everything again, and could outlive this one."""
        return super().nemo_setup(model, trainer, *args, ckpt_async_save=False, **kwargs)  # type: ignore[misc]


class SavesHere:
    """Stands in for Megatron-Core's queue of asynchronous saves. Before 0.15, it forks a process for every save."""

    def schedule_async_request(self, request: Any) -> None:
        """Save and finish."""
        arguments = list(request.async_fn_args)
        if preload := getattr(request, "preload_fn", None):
            arguments[1] = preload()  # the tensors, on the CPU
        if request.async_fn:
            request.async_fn(*arguments, **getattr(request, "async_fn_kwargs", {}))
        torch.distributed.barrier()
        for finish in request.finalize_fns:
            finish()

    def maybe_finalize_async_calls(self, *_args: Any, **_kwargs: Any) -> None:
        """Do nothing: it is done."""


def importer_of(source: Path) -> Any:
    """NeMo's importer for a Hugging Face directory, changed as in `OneDirectory`. JobError: unknown model type."""
    kind = json.loads((source / "config.json").read_text()).get("model_type")
    if kind not in IMPORTERS:
        raise JobError(f"cannot convert a checkpoint of model_type {kind}", f"use one of {', '.join(IMPORTERS)}")
    return type("Importer", (OneDirectory, IMPORTERS[kind]), {})(str(source))


def import_directory(source: Path, output: Path, scratch: Path) -> str:
    """Convert the Hugging Face directory `source` to `output`/{context,weights}. Returns whose layers it was converted with.

    `scratch` is the name of a new directory for the tokenizer, which is removed at the end.
    """
    _keep_to_this_process()
    importer = importer_of(source)
    importer.tokenizer_directory = scratch / "nemo_tokenizer"  # the name that NeMo looks for in a checkpoint
    try:
        if torch.cuda.is_available():
            importer.apply(output)
            return "transformer_engine"
        cpu.stand_in()
        with cpu.plain_import():
            importer.apply(output)
        return "local"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _keep_to_this_process() -> None:
    """Make Megatron's forked processes end with this one.

    Saving is not asynchronous here, so a plain queue replaces Megatron-Core's, which needs a server process (two
    seconds to start).
    """
    base.async_calls = SavesHere()
    filesystem_async._results_queue = queue.Queue()
    children.end_with_this_process()
