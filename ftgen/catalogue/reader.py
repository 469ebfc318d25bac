"""Reads the catalogue: models, GPUs, optimizations and kinds of lines in logs.

In: the TOML files of this folder, or a table (`Mapping[str, Any]`). Out: a `Model`, `Gpu`, `Optimization` or `RunLine`.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import tomli

HERE = Path(__file__).parent


class Split(NamedTuple):
    """How a model is split over GPUs if the spec does not set `parallelism`. The first row that fits the run is used."""

    scheme: str  # sft, lora
    memory_gib: float  # minimum of one GPU
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = False


class Model(NamedTuple):
    """The architecture of a model, by Megatron's names, and where its weights come from."""

    name: str
    title: str
    hf_id: str  # Hugging Face repository, org/name
    checkpoint: str  # default of checkpoint.source: hub, random
    gated: bool  # the hub requires a token with access
    nemo_recipe: str  # module in nemo.collections.llm.recipes
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    max_position_embeddings: int  # tokens
    rope_theta: float
    source: str
    megatron_bridge_recipe: str | None = None  # module in megatron.bridge.recipes and name of the model; None: it has none
    kv_channels: int | None = None  # width of an attention head; None: hidden_size / num_attention_heads
    tied_embeddings: bool = False  # LM head and embedding have the same weights
    qkv_bias: bool = False  # queries, keys and values have a bias
    rope_scaling_factor: float | None = None  # of the rotary frequencies, as in Llama 3.1; None: no scaling
    parallelism: tuple[Split, ...] = ()  # in the order of preference; without a row that fits, the model is not split
    flops_per_sample: float | None = None  # of SFT, forward and backward, for flops_seq_length tokens
    flops_seq_length: int | None = None

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def matrix_weights(self) -> int:
        """Number of weights in matrix products: projections, MLPs and the LM head, but not the embedding and the norms."""
        attention = self.hidden_size * self.head_size * 2 * (self.num_attention_heads + self.num_query_groups)
        mlp = 3 * self.hidden_size * self.ffn_hidden_size
        return self.num_layers * (attention + mlp) + self.hidden_size * self.vocab_size

    @property
    def parameters(self) -> int:
        """Number of all weights. RMS norms have no bias. Tied embeddings count once."""
        embedding = 0 if self.tied_embeddings else self.hidden_size * self.vocab_size
        bias = self.qkv_bias * self.head_size * (self.num_attention_heads + 2 * self.num_query_groups)
        return self.matrix_weights + embedding + self.hidden_size * (2 * self.num_layers + 1) + self.num_layers * bias

    def split(self, scheme: str, memory_gib: float) -> Split | None:
        """The first row for the scheme and for GPUs with this memory; None if no row fits."""
        rows = (row for row in self.parallelism if row.scheme == scheme and memory_gib >= row.memory_gib)
        return next(rows, None)

    def flops(self, seq_length: int) -> float:
        """FLOPs of SFT for one sample of `seq_length` tokens, forward and backward, without attention scores."""
        if self.flops_per_sample and self.flops_seq_length:
            return self.flops_per_sample * seq_length / self.flops_seq_length
        return 6.0 * self.matrix_weights * seq_length


class Gpu(NamedTuple):
    """A GPU: its memory and its dense peaks, as the manufacturer publishes them."""

    name: str
    title: str
    memory_gib: float
    precisions: tuple[str, ...]
    peak_tflops: Mapping[str, float]  # dense peaks, by precision
    source: str
    gpus_per_node: int = 8  # the usual number; a spec or a site profile can set another
    driver_name: str | None = None  # a word in the name that nvidia-smi prints
    # What the check of a node compares with: gemm_tflops (BF16, measured), memory_gb_per_s and nvlink_gb_per_s (one
    # direction, published), nvlinks. A GPU is compared only with what is there.
    expected: Mapping[str, float] | None = None
    expected_source: str = ""

    def peak_flops(self, precision: str) -> float | None:
        """Dense peak in FLOP/s; None if the catalogue has no peak for the precision."""
        tflops = self.peak_tflops.get(precision)
        return None if tflops is None else tflops * 1e12


class Optimization(NamedTuple):
    """A change to the engine's stock recipe: what it does, and for which runs it is on by default."""

    name: str
    title: str
    numerics: str  # compared with the stock recipe: "identical", "reordered", "rescaled", "rounded"
    default: Mapping[str, list[str]]  # lists schemes, precisions, gpus and engines: on if all have the value of the run
    why: str
    engines: tuple[str, ...] = ("nemo",)  # the engines that can have it
    lacks: str = ""  # why the other engine cannot have it
    builds_on: str = ""  # the optimization that it cannot do without

    def is_default(self, scheme: str, precision: str, gpu: str, engine: str) -> bool:
        """Whether it is on by default in such a run. Without a list of engines, only with NeMo: it was measured there."""
        named = (("schemes", scheme), ("precisions", precision), ("gpus", gpu), ("engines", engine))
        return all(value in self.default.get(key, ["nemo"]) for key, value in named)


class RunLine(NamedTuple):
    """A kind of line in a log, which tells how the run ended or what it was. `run_lines.toml` says what each field is."""

    kind: str
    words: tuple[bytes, ...]
    pattern: bytes
    between_steps: bool = False
    every: bool = False


class UserCatalogue(NamedTuple):
    """Models and GPUs that a user catalogue adds."""

    models: dict[str, Model]
    gpus: dict[str, Gpu]


def _read(name: str) -> dict[str, Any]:
    return tomli.loads((HERE / f"{name}.toml").read_text(encoding="utf-8"))


@cache
def models() -> dict[str, Model]:
    """Every model, by name."""
    return {name: model_from(name, table) for name, table in _read("models").items()}


@cache
def gpus() -> dict[str, Gpu]:
    """Every GPU, by name."""
    return {name: gpu_from(name, table) for name, table in _read("gpus").items()}


def model_from(name: str, table: Mapping[str, Any]) -> Model:
    """A model from its TOML table."""
    return Model(name=name, **{**table, "parallelism": tuple(Split(**row) for row in table.get("parallelism", ()))})


def gpu_from(name: str, table: Mapping[str, Any]) -> Gpu:
    """A GPU from its TOML table."""
    return Gpu(name=name, **{**table, "precisions": tuple(table["precisions"])})


@cache
def optimizations() -> dict[str, Optimization]:
    """Every optimization, by name."""
    tables = _read("optimizations")
    return {
        name: Optimization(name=name, **{**table, "engines": tuple(table.get("engines", ("nemo",)))})
        for name, table in tables.items()
    }


@cache
def run_lines() -> dict[str, RunLine]:
    """Every kind of line, by name, in the order in which they are looked for."""
    return {
        kind: RunLine(kind, tuple(map(str.encode, table.pop("words"))), table.pop("pattern").encode(), **table)
        for kind, table in _read("run_lines").items()
    }
