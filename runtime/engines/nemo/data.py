"""Give ftgen's tokens, packs and order to NeMo: NeMo's data sets and data module, with another source of examples.

In: the folder of the tokens. Out: batches that NeMo's own collate functions make.

NeMo's own order of examples that are not packed ignores the seed, changes with max_steps and has no epochs: of 40
examples, 31 were among the first 40 samples (NeMo 2.7.3). Here runtime/data/order.py decides. NeMo's sampler counts
through the samples, so a training that resumes at a number of consumed samples continues exactly.

This module imports NeMo (15-40 s), so only a training imports it.
"""

from pathlib import Path
from typing import Any

from nemo.collections.llm.gpt.data.core import GPTSFTDataset, GPTSFTPackedDataset
from nemo.collections.llm.gpt.data.fine_tuning import FineTuningDataModule
from nemo.lightning.io.mixin import IOMixin

from runtime.data import order, store


class Examples(GPTSFTDataset):  # type: ignore[misc]
    """The examples of one split, not packed. `file_path` is <folder>/<split>."""

    def _load_dataset(self) -> None:
        path = Path(self.file_path)
        self.indexed_dataset = store.Examples(path.parent, path.name)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One example. NeMo fills the last batch of a validation with negative numbers, which must have no loss."""
        ids, trained, _ = self.indexed_dataset[number % len(self)]
        mask = trained.astype(float).tolist() if number >= 0 else [0.0] * len(ids)
        unused = {"context_ids": [], "context_length": 0, "answer_ids": [], "metadata": {}}
        return {"input_ids": ids.tolist(), "loss_mask": mask, "token_count": len(ids), **unused}

    def _build_loss_mask(self, processed_example: dict[str, Any]) -> list[float]:
        mask: list[float] = processed_example["loss_mask"]
        return mask


class Packs(GPTSFTPackedDataset):  # type: ignore[misc]
    """The packs of one split. `file_path` is <folder>/<split>."""

    def _load_dataset(self) -> None:
        path = Path(self.file_path)
        self.indexed_dataset = store.Packs(path.parent, path.name)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One pack; a negative number is one without a loss, as above."""
        pack = self.indexed_dataset[number % len(self)]
        return pack if number >= 0 else pack | {"loss_mask": pack["loss_mask"] * 0}


class TokensDataModule(FineTuningDataModule, IOMixin):  # type: ignore[misc]
    """NeMo's data module. `dataset_root` is the folder of the tokens."""

    def prepare_data(self) -> None:
        """Do nothing: runtime/data has prepared all."""

    def train_dataloader(self) -> Any:
        """Batches of the training split, epoch after epoch."""
        in_order = order.InOrder(self.samples("training"), self.max_train_samples, self.seed)
        return self._create_dataloader(in_order, mode="train")

    def val_dataloader(self) -> Any:
        """Batches of the validation split, in the order of the file."""
        return self._create_dataloader(self.samples("validation"), mode="validation")

    def samples(self, split: str) -> Examples | Packs:
        """NeMo's data set of a split."""
        given = {
            "file_path": str(self.dataset_root / split),
            "tokenizer": self.tokenizer,
            "max_seq_length": self.seq_length,
            "prompt_template": "{output}",
            "label_key": "output",
            "truncation_field": None,
            "seed": self.seed,
            **self.dataset_kwargs,
        }
        if self.packed_sequence_size <= 0:
            return Examples(**given)
        packed = {"pad_cu_seqlens": self._pad_cu_seqlens, "pack_metadata_file_path": str(self.pack_metadata)}
        return Packs(**given, **packed)
