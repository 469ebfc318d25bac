"""Give ftgen's tokens, packs and order to Megatron-Bridge: its data sets, with another source of examples.

In: the folder of the tokens. Out: batches that Megatron-Bridge's own collate functions make.

Here runtime/data/order.py decides the order. The sampler counts through the samples, so a training that resumes at a number
of consumed samples continues exactly.

This module imports Megatron-Bridge (10 s), so only a training imports it.
"""

from pathlib import Path
from typing import Any

import torch
from megatron.bridge.data.builders import gpt_sft
from megatron.bridge.data.datasets.gpt_sft import GPTSFTDataset
from megatron.bridge.data.packing.gpt_sft import GPTSFTPackedDataset

from runtime.data import order, store

Plan = dict[str, Any]


def install(plan: Plan, tokens: Path) -> None:
    """Make Megatron-Bridge's builder of data sets take the tokens in this folder, in this process."""

    def build(_path: Any, *, tokenizer: Any, is_test: bool = False, pad_cu_seqlens: bool = False, **_other: Any) -> Any:
        """The data set of one split: the validation split, if `is_test`."""
        split = "validation" if is_test else "training"
        given = {
            "file_path": str(tokens / split),
            "tokenizer": tokenizer,
            "max_seq_length": plan["seq_length"],
            "prompt_template": "{output}",
            "label_key": "output",
            "truncation_field": None,
            "seed": plan["seed"],
            "is_test": is_test,
            "pad_to_max_length": True,
        }
        if plan["data"]["packed"]:
            packed = {"pad_cu_seqlens": pad_cu_seqlens, "pack_metadata_file_path": str(tokens / "metadata.json")}
            samples: Any = Packs(**given, **packed)
        else:
            samples = Examples(**given)
        if is_test:
            return samples
        return order.InOrder(samples, plan["max_steps"] * plan["global_batch_size"], plan["seed"])

    gpt_sft.build_gpt_sft_split = build


class Examples(GPTSFTDataset):  # type: ignore[misc]
    """The examples of one split, not packed. `file_path` is <folder>/<split>."""

    def _load_dataset(self) -> None:
        path = Path(self.file_path)
        self.indexed_dataset = store.Examples(path.parent, path.name)

    def __getitem__(self, number: int) -> dict[str, Any]:
        ids, trained, _ = self.indexed_dataset[number]
        unused = {"context_ids": [], "context_length": 0, "answer_ids": [], "metadata": {}}
        mask = trained.astype(float).tolist()
        return {"input_ids": ids.tolist(), "loss_mask": mask, "token_count": len(ids), **unused}


class Packs(GPTSFTPackedDataset):  # type: ignore[misc]
    """The packs of one split. `file_path` is <folder>/<split>."""

    def _load_dataset(self) -> None:
        path = Path(self.file_path)
        self.indexed_dataset = store.Packs(path.parent, path.name)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.indexed_dataset[number]

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """Megatron-Bridge's batch with our mask. Its own has no loss behind any end of text, also within a conversation."""
        made: dict[str, Any] = super().collate_fn(batch)
        masks = [self._build_loss_mask(pack) for pack in batch]
        mask = self._collate_item(masks, max_length=made["tokens"].shape[1], pad_id=0)
        return made | {"loss_mask": torch.LongTensor(mask)}
