"""The vocabulary of a spec: every key, its unit, its default. In: a document. Out: a frozen `Spec`.

What the keys mean together (do the GPUs fill whole nodes?) is decided in `rules`.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema
from pydantic_core import PydanticCustomError

from ftgen.errors import quoted
from ftgen.units import WALLTIME, parse_walltime

Positive = Annotated[int, Field(ge=1, lt=2**31)]  # what bash, Slurm and PyTorch all count with
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]

CONTROL = re.compile(r"[\x00-\x1f\x7f]")
SECRET = re.compile(r"TOKEN$|TOKEN_|SECRET|PASSWORD|PASSWD|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE)
NOT_SECRET = {"TOKENIZERS_PARALLELISM"}


def is_one_line(text: str) -> bool:
    """Whether the text has no control characters, such as a NUL byte or a newline; no path, name or option may have any."""
    return not CONTROL.search(text)


def _one_line(text: str) -> str:
    if not is_one_line(text):
        raise ValueError(f"must be one line without control characters, found {quoted(text)}")
    return text


def _walltime(text: str) -> str:
    parse_walltime(text)
    return text


def _environment(variables: dict[str, str]) -> dict[str, str]:
    for name in variables:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise PydanticCustomError("at_key", "is no name that a shell can export", {"key": name})
        if SECRET.search(name) and name not in NOT_SECRET:
            raise PydanticCustomError("at_key", "looks like a secret, which no file may hold", {"key": name})
    return variables


OneLine = Annotated[str, AfterValidator(_one_line), WithJsonSchema({"type": "string", "pattern": r"^[^\x00-\x1f\x7f]*$"})]
Walltime = Annotated[str, AfterValidator(_walltime), WithJsonSchema({"type": "string", "pattern": WALLTIME})]
Environment = Annotated[dict[str, OneLine], AfterValidator(_environment)]


class Table(BaseModel):
    """A TOML table: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True, allow_inf_nan=False)


class Lora(Table):
    """Low-rank adaptation; read when scheme = "lora"."""

    rank: Positive = Field(8, description="Rank of the adapters.")
    alpha: Positive = Field(16, description="Scale of the adapters: their output is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in the adapters, a fraction.")
    targets: list[Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]] = Field(
        ["linear_qkv"], min_length=1, description="Megatron's names of the layers that get adapters."
    )


class Parallelism(Table):
    """How the model is split over GPUs; what is left is data-parallel."""

    tensor_model_parallel_size: Positive = Field(1, description="GPUs that share each layer (TP).")
    pipeline_model_parallel_size: Positive = Field(1, description="GPUs that share the stack of layers (PP).")
    context_parallel_size: Positive = Field(1, description="GPUs that share each sequence (CP); needs data.packed = false.")
    virtual_pipeline_model_parallel_size: Positive | None = Field(
        None, description="Chunks of layers for each pipeline stage (VP); needs PP > 1."
    )
    sequence_parallel: bool = Field(False, description="Split norms and dropout along the sequence; needs TP > 1.")


class Data(Table):
    """What is trained on."""

    kind: Literal["squad", "synthetic", "jsonl"] = Field(
        "squad",
        description='"squad": SQuAD from the Hugging Face hub, as the recipe; "synthetic": SQuAD-shaped text made on the '
        'spot, no network; "jsonl": a file of yours.',
    )
    path: OneLine | None = Field(
        None, description='For kind = "jsonl": a file with a JSON object {"input", "output"} on each line.'
    )
    examples: Positive = Field(14000, description='For kind = "synthetic": how many examples are made.')
    packed: bool | None = Field(
        None,
        description="Pack examples into full sequences, so that every token of a step is a real one. "
        "Default: true on GPUs, false on a CPU.",
    )


class Checkpoint(Table):
    """Where the weights come from; the default is the model's own in the catalogue."""

    source: Literal["hub", "random", "directory"] | None = Field(
        None,
        description='"hub": the model\'s Hugging Face repository; "random": random weights of its shape, for speed alone; '
        '"directory": a Hugging Face checkpoint on a disk.',
    )
    revision: OneLine | None = Field(None, description='For source = "hub": a branch, tag or commit. Default: main.')
    path: OneLine | None = Field(None, description='For source = "directory": where it is.')


class Source(Table):
    """A Git repository at one commit."""

    url: OneLine = Field(description="Where to clone from.")
    commit: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")] = Field(description="All 40 digits of it.")


class Sources(Table):
    """Source trees to use in place of what is installed; `ftgen setup SPEC` clones them into $STAGE_PATH."""

    megatron_lm: Source | None = Field(None, description="Megatron-LM.")
    nemo: Source | None = Field(None, description="NeMo.")


class Optimizer(Table):
    """Adam with a cosine schedule, as NeMo's recipe."""

    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate. Default: the recipe's, 1e-4 for LoRA and 5e-6 for SFT."
    )
    warmup_steps: int = Field(50, ge=0, description="Steps over which the learning rate rises to its peak.")


def _optimization(title: str) -> Any:
    return Field(None, description=f"{title}. Default: as measured for the scheme, precision and GPU.")


class Optimizations(Table):
    """What makes a step faster than NeMo's stock recipe; what each does to the numerics is in the catalogue."""

    preset: Literal["measured", "stock"] = Field(
        "measured", description='"measured": what was measured to help is on; "stock": nothing is, NeMo\'s own recipe.'
    )
    cuda_graphs: bool | None = _optimization("CUDA graphs of the transformer layers")
    fused_cross_entropy: bool | None = _optimization("Transformer Engine's fused cross entropy")
    loss_tokens_only: bool | None = _optimization("LM head and loss on the tokens that have a loss")
    scale_small_tensor: bool | None = _optimization("LoRA's scale on the small tensor between its two matrices")
    fused_wgrad_accumulation: bool | None = _optimization("Weight gradients accumulated by the GEMM that makes them")
    skip_nan_check: bool | None = _optimization("No look for NaN in the gradients of each step")
    fused_swiglu: bool | None = _optimization("Transformer Engine's SwiGLU, in FP8 with the cast in it")
    skip_shard_transposes: bool | None = _optimization("No transposes of the shards of FP8 weights")
    short_padding: bool | None = _optimization("A pack's padding as several short sequences")
    merge_micro_batches: bool | None = _optimization("All the packs of a GPU's step as one micro-batch")
    op_fuser: bool | None = _optimization("Transformer Engine's op fuser, which rounds differently")


class Profile(Table):
    """A profiler around some steps of some ranks; it slows them down, so they are none of the timed ones."""

    tool: Literal["nsys", "pytorch"] = Field(
        "nsys", description='"nsys": Nsight Systems, which the node must have; "pytorch": torch.profiler, a Chrome trace.'
    )
    first_step: int = Field(10, ge=0, description="First step that is recorded, counted from 0.")
    last_step: int = Field(12, ge=0, description="Last step that is recorded.")
    ranks: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field([0], min_length=1, description="Ranks that are recorded.")


class Window(Table):
    """The steps whose mean is the reported step time."""

    last_steps: Positive = Field(20, description="How many steps at the end of the run are timed.")


class Matrix(Table):
    """Many experiments from one spec: each point is an experiment of its own, with a name of its own."""

    product: dict[str, Any] = Field({}, description="Keys with lists of values, tables as in the spec: every combination.")
    zip: dict[str, Any] = Field({}, description="Keys with lists of one length: the first of each, the second of each ...")
    exclude: list[dict[str, Any]] = Field([], description="Points to leave out, by some of their values.")
    include: list[dict[str, Any]] = Field([], description="Points to add, each a table of the keys that it sets.")
    name: OneLine | None = Field(
        None,
        min_length=1,
        description='Name of each experiment, with keys in braces: "{scheme}_{precision}_{gpus}". '
        "Default: the file's name and the values that vary.",
    )


class Spec(Table):
    """One fine-tuning benchmark. Only scheme, precision and gpus have no default; the defaults are the recipe's."""

    scheme: Literal["sft", "lora"] = Field(description="Train every weight (sft), or low-rank adapters (lora).")
    precision: Literal["bf16", "fp8", "fp32"] = Field(
        description="Arithmetic of the matrix products; fp8 is delayed scaling over BF16, fp32 is for the CPU alone."
    )
    gpus: Positive = Field(description="GPUs in all; whole nodes, or a part of one.")
    model: Name = Field("llama3_8b", description="The model's name in the catalogue.")
    gpu: Name = Field("h100", description='The GPU\'s name in the catalogue; "cpu" trains without one.')
    gpus_per_node: Positive | None = Field(None, description="GPUs of a node. Default: the site profile's, or 8.")
    max_steps: Positive = Field(100, description="Training steps.")
    global_batch_size: Positive | None = Field(None, description="Sequences a step. Default: 4 x gpus.")
    micro_batch_size: Positive = Field(1, description="Sequences a GPU works on at once.")
    seq_length: Positive = Field(4096, description="Tokens in a sequence.")
    seed: int = Field(1234, ge=1, lt=2**31, description="Seed of the weights' initialization and the data's order.")
    walltime: Walltime = Field("00:30:00", description="Time limit of the job, [days-]hours:minutes:seconds.")
    convert_walltime: Walltime = Field(
        "02:00:00", description="Time limit of the checkpoint's download and conversion, [days-]hours:minutes:seconds."
    )
    lora: Lora = Field(default_factory=Lora, description="The adapters.")
    parallelism: Parallelism = Field(default_factory=Parallelism, description="How the model is split over GPUs.")
    data: Data = Field(default_factory=Data, description="What is trained on.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="Where the weights come from.")
    sources: Sources = Field(default_factory=Sources, description="Other sources of the framework.")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="Adam's settings.")
    optimizations: Optimizations = Field(
        default_factory=Optimizations, description="What makes a step faster than the stock recipe."
    )
    window: Window = Field(default_factory=Window, description="The steps that are timed.")
    profile: Profile | None = Field(None, description="A profiler around some steps. Default: none.")
    environment: Environment = Field(
        {}, description="Environment variables of the training, over the recipe's and the site's."
    )
    extends: OneLine | None = Field(
        None,
        min_length=1,
        description="Another spec, relative to this one, whose keys hold where this one does not say them.",
    )
    catalogue: OneLine | None = Field(
        None, min_length=1, description="A catalogue file of your own, relative to this one: [models.NAME], [gpus.NAME]."
    )
    matrix: Matrix | None = Field(None, description="Many experiments from this one spec.")


def json_schema() -> dict[str, Any]:
    """JSON Schema of a spec, for editors: what a base or a matrix says need not be said again."""
    schema = Spec.model_json_schema()
    needed = schema.pop("required")
    return schema | {"anyOf": [{"required": needed}, {"required": ["extends"]}, {"required": ["matrix"]}]}
