"""Read tensors of a distributed checkpoint (torch.distributed.checkpoint) in one process, one tensor or layer at a time.

In: the folder with `.metadata` and `*.distcp`, as Megatron's format "torch_dist" has them, or the folder around it, which
Megatron-Bridge makes. Out: `torch.Tensor`s.

However many processes wrote the checkpoint, and however they split its tensors, each tensor here is whole. Neither a
model nor a process group is needed. `.metadata` is a pickle that names classes of the framework that wrote it. This
module never imports them: only torch's own classes are real, and a stand-in takes the place of every other class.
"""

import pickle
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.job.errors import JobError

if TYPE_CHECKING:
    import torch

METADATA = ".metadata"
PREFIX = "module."  # Megatron's wrapper of the model
NOT_WEIGHTS = ("optimizer", "rng_state", "rerun_state")  # the first word of other tensors
REAL = ("torch.distributed.checkpoint", "torch.serialization", "collections", "pathlib")  # whose classes are unpickled


class Checkpoint:
    """The weights of a distributed checkpoint, by their names without Megatron's prefix."""

    def __init__(self, folder: Path) -> None:
        """JobError: there is no such checkpoint in the folder."""
        self.folder = inner(folder)
        self._reader = _reader(self.folder)
        self._saved = {
            name.removeprefix(PREFIX): (name, saved)
            for name, saved in self._reader.read_metadata().state_dict_metadata.items()
            if hasattr(saved, "chunks") and not name.startswith(NOT_WEIGHTS)
        }

    @property
    def names(self) -> set[str]:
        """Names of all weights, without optimizer states."""
        return set(self._saved)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor; the first dimension of a layer's weight is the layer."""
        return tuple(self._tensor(name).size)

    def read(self, name: str, layer: int | None = None) -> "torch.Tensor":
        """The whole tensor, or its row `layer`, which alone is then read. JobError: it is not there, or not complete."""
        import torch
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
        from torch.distributed.checkpoint.planner import LoadPlan
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        saved = self._tensor(name)
        begin, shape = [0] * len(saved.size), list(saved.size)
        if layer is not None:
            begin[0], shape[0] = layer, 1
        found = torch.empty(shape, dtype=saved.properties.dtype)
        wanted = ChunkStorageMetadata(offsets=torch.Size(begin), sizes=torch.Size(shape))
        items = create_read_items_for_chunk_list(self._saved[name][0], saved, [wanted])
        if sum(prod(item.lengths) for item in items) != found.numel():
            raise JobError(f"{self.folder}: {name} is not complete", "use another checkpoint of the run")
        self._reader.read_data(LoadPlan(items), _planner(found)).wait()
        return found if layer is None else found[0]

    def _tensor(self, name: str) -> Any:
        if name not in self._saved:
            raise JobError(f"{self.folder} has no tensor {name}", "use the script that trained this checkpoint")
        return self._saved[name][1]


def inner(folder: Path) -> Path:
    """The folder with `.metadata`: this one, or with Megatron-Bridge its only iter_<N>."""
    return next((path.parent for path in folder.glob(f"iter_*/{METADATA}")), folder)


def _reader(folder: Path) -> Any:
    """torch's reader, with our way to read the metadata."""
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):  # type: ignore[misc]
        def read_metadata(self, *_args: Any, **_kwargs: Any) -> Any:
            with (folder / METADATA).open("rb") as file:
                return _Unpickler(file).load()

    reader = Reader(folder)
    try:
        reader.set_up_storage_reader(reader.read_metadata(), is_coordinator=True)
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise JobError(
            f"{folder} has no distributed checkpoint: {error}", "give a folder whose weights/ has .metadata and *.distcp"
        ) from error
    return reader


def _planner(target: "torch.Tensor") -> Any:
    """A planner that copies what is read to its place in `target`."""
    from torch.distributed.checkpoint import DefaultLoadPlanner

    class IntoTarget(DefaultLoadPlanner):  # type: ignore[misc]
        def resolve_tensor(self, read_item: Any) -> "torch.Tensor":
            place = target
            for dimension, (begin, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
                place = place.narrow(dimension, begin, length)
            return place

        def commit_tensor(self, read_item: Any, tensor: "torch.Tensor") -> None:
            """Do nothing: the tensor is already in its place."""

    return IntoTarget()


class _StandIn:
    """Stands in for a class of the framework that wrote the checkpoint."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Imports nothing but torch and the standard library, so that neither Megatron nor Transformer Engine is needed."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" or module.startswith(REAL):
            return super().find_class(module, name)
        return type(name, (_StandIn,), {"__module__": module})
