"""Keep tokenized examples in files that a training maps into its memory.

In: `Tokens` of the examples of one split, and packs. Out: arrays below a folder, <split>.<array>.npy; and readers of them.

All ranks of a node share the mapped pages, and none unpickles an object for each token, as NeMo's own packs need.
"""

from array import array
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from runtime.data.tokenizer import Tokens

SMALL = 1 << 20  # bytes; a smaller file is read, because an empty array cannot be mapped


class Writer:
    """Collects the examples of one split in memory, 5 bytes for each token, and writes them at the end."""

    def __init__(self) -> None:
        self.ids, self.trained, self.starts, self.places = array("i"), array("B"), array("q", [0]), array("q")

    def add(self, tokens: Tokens, place: int) -> None:
        """Add an example; `place` is its number in training.jsonl or validation.jsonl, from 0."""
        self.ids.frombytes(tokens.ids.tobytes())
        self.trained.frombytes(tokens.trained.tobytes())
        self.starts.append(len(self.ids))
        self.places.append(place)

    def write(self, folder: Path, split: str) -> "Examples":
        """Write the arrays, and return the reader."""
        arrays = {
            "ids": np.asarray(self.ids, np.int32),
            "trained": np.asarray(self.trained, np.uint8).view(bool),
            "starts": np.asarray(self.starts, np.int64),
            "places": np.asarray(self.places, np.int64),
        }
        for name, values in arrays.items():
            np.save(_file(folder, split, name), values)
        return Examples(folder, split)


class Examples:
    """The tokenized examples of one split."""

    def __init__(self, folder: Path, split: str) -> None:
        self.ids, self.trained, self.starts, self.places = (
            _load(_file(folder, split, name)) for name in ("ids", "trained", "starts", "places")
        )

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Tokens:
        begin, end = self.starts[number], self.starts[number + 1]
        return Tokens(self.ids[begin:end], self.trained[begin:end], None)

    def lengths(self) -> Any:
        """Tokens of each example: int64 [examples]."""
        return np.diff(self.starts)


def write_packs(folder: Path, split: str, packs: list[list[int]]) -> None:
    """Write the packs, which are lists of example numbers."""
    np.save(_file(folder, split, "packed"), np.fromiter(chain.from_iterable(packs), np.int64))
    np.save(_file(folder, split, "packs"), np.cumsum([0, *map(len, packs)]))


class Packs:
    """The packs of one split, in the form of NeMo's packed data set."""

    def __init__(self, folder: Path, split: str) -> None:
        self.examples = Examples(folder, split)
        self.packed, self.packs = (_load(_file(folder, split, name)) for name in ("packed", "packs"))

    def __len__(self) -> int:
        return len(self.packs) - 1

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The tokens of one pack, where each example begins, and the mask: true where the next token is trained."""
        members = [self.examples[int(one)] for one in self.packed[self.packs[number] : self.packs[number + 1]]]
        ends = np.cumsum([len(one.ids) for one in members])
        return {
            "input_ids": np.concatenate([one.ids for one in members]),
            "seq_boundaries": [0, *ends.tolist()],
            "loss_mask": np.concatenate([np.append(one.trained[1:], False) for one in members]),
        }


def _file(folder: Path, split: str, name: str) -> Path:
    return folder / f"{split}.{name}.npy"


def _load(file: Path) -> Any:
    return np.load(file, mmap_mode="r" if file.stat().st_size > SMALL else None)
