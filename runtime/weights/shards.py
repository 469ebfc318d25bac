"""Write and read safetensors files one tensor at a time, so that memory holds one tensor and not one file.

In: what each file contains, and a function that gives each tensor. Out: the files, and their index.

A safetensors file is the length of its header (8 bytes, little-endian), the header as JSON, and the bytes of the
tensors one after the other (https://github.com/huggingface/safetensors, "Format").
"""

import json
import struct
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.job.errors import JobError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The types that models have, by their names in a header.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ALIGNMENT = 8  # bytes; the header is padded with spaces


class Entry(NamedTuple):
    """What a header says of a tensor."""

    dtype: str  # BF16, F32
    shape: tuple[int, ...]
    file: str

    @property
    def size(self) -> int:
        """Bytes."""
        import torch

        return prod(self.shape) * int(torch.finfo(torch_dtype(self.dtype)).bits) // 8


def torch_dtype(name: str) -> "torch.dtype":
    """The type of a header as torch's. JobError: weights of another type, such as quantized ones."""
    import torch

    if name not in DTYPES:
        raise JobError(f"weights of type {name} cannot be exported", f"use a base with {', '.join(DTYPES)}")
    return getattr(torch, DTYPES[name])


def header_name(dtype: "torch.dtype") -> str:
    """The name of torch's type in a header."""
    return next(name for name, known in DTYPES.items() if f"torch.{known}" == str(dtype))


def files_of(folder: Path) -> list[str]:
    """Names of the weight files of a folder in Hugging Face format. OSError, ValueError: it is none."""
    if (folder / INDEX).exists():
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    return [SINGLE]


def entries(folder: Path, files: Iterable[str]) -> dict[str, Entry]:
    """What the headers of the files say, by tensor, in the order of the bytes. OSError, ValueError: a file is damaged."""
    return {
        name: Entry(said["dtype"], tuple(said["shape"]), file)
        for file in files
        for name, said in sorted(_header(folder / file).items(), key=lambda item: item[1]["data_offsets"])
    }


def read(folder: Path, name: str, entry: Entry) -> "torch.Tensor":
    """One tensor of a file."""
    from safetensors import safe_open

    with safe_open(folder / entry.file, framework="pt") as file:
        return file.get_tensor(name)


def write(
    folder: Path, tensors: dict[str, Entry], tensor_of: Callable[[str], "torch.Tensor"], *, index: bool = True
) -> None:
    """Write each tensor into its file, in the order of `tensors`; and the index of a model that has several files.

    JobError: `tensor_of` gives another shape or type than the entry has, or a value that is no number.
    """
    files = list(dict.fromkeys(entry.file for entry in tensors.values()))
    for file in files:
        _write_file(folder / file, {name: entry for name, entry in tensors.items() if entry.file == file}, tensor_of)
    if index and files != [SINGLE]:
        total = sum(entry.size for entry in tensors.values())
        weight_map = {name: entry.file for name, entry in sorted(tensors.items())}
        document = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(document, indent=2) + "\n")


def _write_file(path: Path, tensors: dict[str, Entry], tensor_of: Callable[[str], "torch.Tensor"]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in tensors.items():
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [end, end + entry.size]}
        end += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, entry in tensors.items():
            file.write(_bytes(name, entry, tensor_of(name)))


def _bytes(name: str, entry: Entry, tensor: "torch.Tensor") -> memoryview:
    import torch

    if tuple(tensor.shape) != entry.shape or tensor.dtype != torch_dtype(entry.dtype):
        raise JobError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, but the base has {entry.dtype} {list(entry.shape)}",
            "use the script and the base that this checkpoint was trained with",
        )
    # NaN and infinity are in the smallest or the largest value; isfinite of all values needs memory for three more tensors
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise JobError(f"{name} has values that are no numbers: the training diverged", "export an earlier checkpoint")
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")


def _header(path: Path) -> dict[str, Any]:
    """The header of a complete file, without its metadata."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > path.stat().st_size:
            raise ValueError(f"{path} is no safetensors file")
        document: dict[str, Any] = json.loads(file.read(length))
    document.pop("__metadata__", None)
    end = 8 + length + max((said["data_offsets"][1] for said in document.values()), default=0)
    if end != path.stat().st_size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, but its header says {end}")
    return document
