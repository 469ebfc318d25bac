"""Models, GPUs and published results as data: the TOML tables beside this file, read into frozen records."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import tomli

HERE = Path(__file__).parent


class Split(NamedTuple):
    """How a model is split over GPUs where the spec does not say: the first row that fits the run."""

    scheme: str  # sft, lora
    memory_gib: float  # of one GPU, at least
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = False


class Model(NamedTuple):
    """A model's architecture under Megatron's names, and where its weights come from."""

    name: str
    title: str
    hf_id: str  # Hugging Face repository, org/name
    checkpoint: str  # where weights come from unless the spec says otherwise: hub, random
    gated: bool  # the hub asks for a token with access
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
    kv_channels: int | None = None  # width of an attention head; None is hidden_size / num_attention_heads
    tied_embeddings: bool = False  # the LM head is the embedding
    qkv_bias: bool = False  # queries, keys and values have one
    rope_scaling_factor: float | None = None  # Llama 3.1's scaling of the rotary frequencies; None is without
    parallelism: tuple[Split, ...] = ()  # in the order of preference; without a row that fits it is not split
    flops_per_sample: float | None = None  # SFT, forward and backward, for flops_seq_length tokens
    flops_seq_length: int | None = None

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def matrix_weights(self) -> int:
        """Weights that take part in matrix products: projections, MLPs and the LM head; not the embedding, not the norms."""
        attention = self.hidden_size * self.head_size * 2 * (self.num_attention_heads + self.num_query_groups)
        mlp = 3 * self.hidden_size * self.ffn_hidden_size
        return self.num_layers * (attention + mlp) + self.hidden_size * self.vocab_size

    @property
    def parameters(self) -> int:
        """All weights: RMS norms without bias, an embedding of its own unless the LM head is it."""
        embedding = 0 if self.tied_embeddings else self.hidden_size * self.vocab_size
        bias = self.qkv_bias * self.head_size * (self.num_attention_heads + 2 * self.num_query_groups)
        return self.matrix_weights + embedding + self.hidden_size * (2 * self.num_layers + 1) + self.num_layers * bias

    def split(self, scheme: str, memory_gib: float) -> Split | None:
        """How to split it over GPUs of this much memory; None where no row says."""
        rows = (row for row in self.parallelism if row.scheme == scheme and memory_gib >= row.memory_gib)
        return next(rows, None)

    def flops(self, seq_length: int) -> float:
        """FLOPs of one SFT sample of `seq_length` tokens, forward and backward, without attention scores."""
        if self.flops_per_sample and self.flops_seq_length:
            return self.flops_per_sample * seq_length / self.flops_seq_length
        return 6.0 * self.matrix_weights * seq_length


class Gpu(NamedTuple):
    """An accelerator: memory and dense peaks, as its maker publishes them."""

    name: str
    title: str
    memory_gib: float
    precisions: tuple[str, ...]
    peak_tflops: Mapping[str, float]  # dense, by precision
    source: str

    def peak_flops(self, precision: str) -> float | None:
        """Dense peak in FLOP/s, None where no peak is claimed."""
        tflops = self.peak_tflops.get(precision)
        return None if tflops is None else tflops * 1e12


class Optimization(NamedTuple):
    """A change to NeMo's stock recipe: what it does, and where measurements put it on."""

    name: str
    title: str
    numerics: str  # "identical" to the stock recipe, "reordered" sums, or "rounded"
    default: Mapping[str, list[str]]  # schemes, precisions, gpus: on where all three name the run
    why: str

    def is_default(self, scheme: str, precision: str, gpu: str) -> bool:
        """Whether it is on in this run unless the spec says otherwise."""
        named = (("schemes", scheme), ("precisions", precision), ("gpus", gpu))
        return all(value in self.default[key] for key, value in named)


class Published(NamedTuple):
    """One column of the recipe's result tables, as printed there."""

    model: str
    gpu: str
    scheme: str
    precision: str
    gpus: int
    global_batch_size: int
    seq_length: int
    step_time_s: float
    tokens_per_s: float
    mfu: float  # a fraction
    days_per_1t_tokens: float


class UserCatalogue(NamedTuple):
    """Models and GPUs of a catalogue file of the user's."""

    models: dict[str, Model]
    gpus: dict[str, Gpu]


def _read(name: str) -> dict[str, Any]:
    return tomli.loads((HERE / f"{name}.toml").read_text(encoding="utf-8"))


@cache
def models() -> dict[str, Model]:
    """Every known model by name."""
    return {name: model_from(name, table) for name, table in _read("models").items()}


@cache
def gpus() -> dict[str, Gpu]:
    """Every known accelerator by name."""
    return {name: gpu_from(name, table) for name, table in _read("gpus").items()}


def model_from(name: str, table: Mapping[str, Any]) -> Model:
    """A model from its TOML table."""
    return Model(name=name, **{**table, "parallelism": tuple(Split(**row) for row in table.get("parallelism", ()))})


def gpu_from(name: str, table: Mapping[str, Any]) -> Gpu:
    """A GPU from its TOML table."""
    return Gpu(name=name, **{**table, "precisions": tuple(table["precisions"])})


@cache
def optimizations() -> dict[str, Optimization]:
    """Every known optimization by name."""
    return {name: Optimization(name=name, **table) for name, table in _read("optimizations").items()}


@cache
def published() -> tuple[Published, ...]:
    """The recipe's published results, in the order of its tables."""
    return tuple(Published(**row) for row in _read("published")["result"])


def published_for(model: str, scheme: str, precision: str, gpus: int) -> Published | None:
    """The published result of this experiment, whatever it now runs on."""
    wanted = (model, scheme, precision, gpus)
    return next((row for row in published() if (row.model, row.scheme, row.precision, row.gpus) == wanted), None)
