"""The weights of a trained model by Hugging Face's names, one at a time.

In: a plan, the checkpoint with the weights, and with LoRA the checkpoint with the adapters. Out: `torch.Tensor`s.

With SFT, the trained checkpoint has the weights. With LoRA, the converted checkpoint has them, and the trained one has
the adapters.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from runtime.export import names
from runtime.export.names import Source
from runtime.job.errors import JobError
from runtime.weights.distributed import Checkpoint

if TYPE_CHECKING:
    import torch

Plan = dict[str, Any]


class Trained:
    """The trained weights. A weight of a layer that has an adapter is merged with it."""

    def __init__(self, plan: Plan, weights: Checkpoint, adapters: Checkpoint | None) -> None:
        self.model = plan["model"]
        self.weights, self.adapters = weights, adapters
        self.scale = plan["lora"]["alpha"] / plan["lora"]["rank"] if adapters else 0.0
        self.rank = plan["lora"]["rank"] if adapters else 0
        self._last: tuple[tuple[Checkpoint, str, int | None], torch.Tensor] | None = None

    def source(self, name: str) -> Source:
        """Where a weight of Hugging Face is. JobError: no family of ftgen has such a weight."""
        source = names.source(name)
        if source is None:
            what = f"the base has a weight {name}, which ftgen cannot export"
            raise JobError(what, "export it with the exporter of the engine")
        tied = source.name == names.HEAD and self.model["tied_embeddings"]
        return Source(names.EMBEDDING, None, "", "") if tied else source

    def weight(self, name: str, dtype: "torch.dtype") -> "torch.Tensor":
        """The weight of a Hugging Face name; if it has an adapter, W + alpha / rank * B @ A in float32, then in `dtype`."""
        source = self.source(name)
        found = names.rows(self.read(self.weights, source.name, source.layer), source.part, self.model)
        if source.name in names.PADDED:
            found = found[: self.model["vocab_size"]]
        if self.has_adapter(source) and name.endswith(".weight"):
            a, b = self.adapter(source)
            found = found.float() + self.scale * (b.float() @ a.float())
        return found.to(dtype)

    def adapter(self, source: Source) -> tuple["torch.Tensor", "torch.Tensor"]:
        """A [rank, in] and B [out, rank] of a weight, B with its own rows only. JobError: another rank than the plan's."""
        assert self.adapters  # noqa: S101 - `has_adapter` says so
        a = self.read(self.adapters, names.adapter(source.linear, "in"), source.layer)
        b = names.rows(self.read(self.adapters, names.adapter(source.linear, "out"), source.layer), source.part, self.model)
        if a.shape[0] != self.rank:
            raise JobError(
                f"the adapters in {self.adapters.folder} have rank {a.shape[0]}, the plan has lora.rank = {self.rank}",
                "use the script that trained this checkpoint",
            )
        return a, b

    def has_adapter(self, source: Source) -> bool:
        """Whether the layer of this weight has an adapter."""
        return bool(self.adapters and source.linear and names.adapter(source.linear, "in") in self.adapters.names)

    def adapted(self, base: Iterable[str]) -> dict[str, Source]:
        """Those of the base's weights that have an adapter, by Hugging Face's name."""
        found = {name: source for name in base if name.endswith(".weight") and (source := names.source(name))}
        return {name: source for name, source in found.items() if self.has_adapter(source)}

    def has_own_head(self) -> bool:
        """Whether the LM head differs from the embedding."""
        if self.model["tied_embeddings"]:
            return False
        head, embedding = (self.read(self.weights, name, None) for name in (names.HEAD, names.EMBEDDING))
        return not head.equal(embedding)

    def read(self, checkpoint: Checkpoint, name: str, layer: int | None) -> "torch.Tensor":
        """A tensor of Megatron. The last one is kept, because several weights are rows of one tensor."""
        key = (checkpoint, name, layer)
        if self._last is None or self._last[0] != key:
            self._last = None  # free it before the next one is read
            self._last = (key, checkpoint.read(name, layer))
        return self._last[1]

    def refuse_unknown(self, base: Iterable[str]) -> None:
        """JobError unless the base's weights are all of the checkpoint's tensors, and all of them are known."""
        used = {self.source(name).name for name in base}
        if unknown := sorted(self.weights.names - used - {names.HEAD}):
            raise _unknown(self.weights, unknown)
        if self.adapters:
            linears = {linear for linear, _ in names.LINEAR.values()}
            known = {names.adapter(linear, matrix) for linear in linears for matrix in ("in", "out")}
            if unknown := sorted(self.adapters.names - known):
                raise _unknown(self.adapters, unknown)


def _unknown(checkpoint: Checkpoint, unknown: list[str]) -> JobError:
    return JobError(
        f"{checkpoint.folder} has tensors that the base does not have: {', '.join(unknown[:5])}",
        "use the base that this checkpoint was trained from",
    )
