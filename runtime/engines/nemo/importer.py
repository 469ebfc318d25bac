"""NeMo's own importers of Hugging Face checkpoints, kept to one directory. In: a Hugging Face one. Out: a NeMo checkpoint.

This module imports NeMo (15-40 s): only a conversion does.
"""

import ctypes
import json
import os
import queue
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from nemo.collections.llm.gpt.model.llama import HFLlamaImporter
from nemo.collections.llm.gpt.model.mistral import HFMistralImporter
from nemo.collections.llm.gpt.model.qwen2 import HFQwen2Importer
from transformers import AutoTokenizer

from runtime.engines.nemo import cpu
from runtime.job.errors import JobError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIBC = ctypes.CDLL(None)


# NeMo's importers by the `model_type` of a config.json.
IMPORTERS = {"llama": HFLlamaImporter, "mistral": HFMistralImporter, "qwen2": HFQwen2Importer}


class OurHabits:
    """Of the stock importer's habits two are left out: a shared folder in /tmp, and a second process for saving."""

    tokenizer_directory: Path

    def save_hf_tokenizer_assets(self, tokenizer_name_or_path: str, save_path: str = "") -> str:
        """Keep the tokenizer in a folder of our own; the checkpoint gets a copy under the folder's name."""
        target = save_path or str(self.tokenizer_directory)
        AutoTokenizer.from_pretrained(tokenizer_name_or_path).save_pretrained(target)  # and no code of the model's
        return target

    def nemo_setup(self, model: Any, trainer: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Save in this process: another one would import everything again, and may outlive us."""
        return super().nemo_setup(model, trainer, *args, ckpt_async_save=False, **kwargs)  # type: ignore[misc]


def importer_of(source: Path) -> Any:
    """NeMo's importer of this Hugging Face directory, with our habits; JobError: NeMo has none that ftgen knows."""
    kind = json.loads((source / "config.json").read_text()).get("model_type")
    if kind not in IMPORTERS:
        raise JobError(f"a checkpoint of type {kind} cannot be converted", f"one of {', '.join(IMPORTERS)}")
    return type("Importer", (OurHabits, IMPORTERS[kind]), {})(str(source))


def import_directory(source: Path, output: Path, scratch: Path) -> str:
    """Convert the Hugging Face directory `source` to `output`/{context,weights}; the kind of layers it was made with.

    `scratch` is a new directory's name beside them; it is removed again.
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
    """Nothing that Megatron starts to save outlives us when we are killed: it would keep our memory and our output.

    The queue of results needs no server process of its own (two seconds to start) where saving is not asynchronous.
    """
    filesystem_async._results_queue = queue.Queue()
    os.register_at_fork(after_in_child=_die_with_the_parent)


def _die_with_the_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
