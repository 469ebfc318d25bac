"""Defines every key of a spec, with its unit and its default.

In: a document (`dict[str, Any]`). Out: a frozen `Spec`.

`ftgen.plan.rules` checks how the keys fit together, such as whether the GPUs fill whole nodes.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema
from pydantic_core import PydanticCustomError

from ftgen.errors import quoted
from ftgen.secret import is_secret
from ftgen.units import WALLTIME, parse_walltime

Positive = Annotated[int, Field(ge=1, lt=2**31)]  # bash, Slurm and PyTorch all take these integers
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]

CONTROL = re.compile(r"[\x00-\x1f\x7f]")
PASSWORD = re.compile(r"://[^/@\s]+:[^/@\s$]+@")  # in the address of a proxy; $NAME is none
OTHER_EXPANSION = re.compile(r"\$\$|(\$\{[A-Za-z_][A-Za-z0-9_]*[^A-Za-z0-9_}].*)")  # $$ is a dollar, ${X:-y} is refused


def is_one_line(text: str) -> bool:
    """Whether the text has no control characters (NUL byte, newline). No path, name or option may have one."""
    return not CONTROL.search(text)


def _one_line(text: str) -> str:
    if not is_one_line(text):
        raise ValueError(f"must be one line without control characters, found {quoted(text)}")
    return text


def _walltime(text: str) -> str:
    parse_walltime(text)
    return text


def _environment(variables: dict[str, str]) -> dict[str, str]:
    for name, value in variables.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            rule = "must be a name that a shell can export"
            raise PydanticCustomError("at_key", rule, {"key": name, "hint": "use A-Z, a-z, 0-9 and _; begin with a letter"})
        if is_secret(name):
            rule = "must not be in a file: its name looks like a secret"
            raise PydanticCustomError("at_key", rule, {"key": name, "hint": "export it in the shell that submits the job"})
        if other := next((found[1] for found in OTHER_EXPANSION.finditer(value) if found[1]), None):
            hint = "write $NAME: if it is unset, no colon is left over. Use setup_lines of the site profile for all else"
            rule = "must have no expansions but $NAME and ${NAME}, found {other}"
            raise PydanticCustomError("at_key", rule, {"key": name, "hint": hint, "other": quoted(other)})
        if PASSWORD.search(value):
            rule = "must not be in a file: its address has a password"
            raise PydanticCustomError("at_key", rule, {"key": name, "hint": "export it in the shell that submits the job"})
    return variables


OneLine = Annotated[str, AfterValidator(_one_line), WithJsonSchema({"type": "string", "pattern": r"^[^\x00-\x1f\x7f]*$"})]
Walltime = Annotated[str, AfterValidator(_walltime), WithJsonSchema({"type": "string", "pattern": WALLTIME})]
Environment = Annotated[dict[str, OneLine], AfterValidator(_environment)]


class Table(BaseModel):
    """A TOML table. Validation refuses unknown keys and wrong types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True, allow_inf_nan=False)


class Lora(Table):
    """Low-rank adaptation. The table requires scheme = "lora"."""

    rank: Positive = Field(8, description="Rank of the adapters.")
    alpha: Positive = Field(16, description="Scale of the adapters. Their output is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability in the adapters, from 0 to 1.")
    targets: list[Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]] = Field(
        ["linear_qkv"], min_length=1, description="Layers that get adapters, by Megatron's names."
    )


class Parallelism(Table):
    """How the model is split over GPUs. The other GPUs are data-parallel replicas."""

    tensor_model_parallel_size: Positive = Field(1, description="GPUs that share each layer (TP).")
    pipeline_model_parallel_size: Positive = Field(1, description="Number of pipeline stages (PP).")
    context_parallel_size: Positive = Field(
        1, description="GPUs that share each sequence (CP). CP > 1 needs data.packed = false."
    )
    virtual_pipeline_model_parallel_size: Positive | None = Field(
        None, description="Number of virtual stages in each pipeline stage (VP). Needs PP > 1."
    )
    sequence_parallel: bool = Field(False, description="Split norms and dropout along the sequence. Needs TP > 1.")


class Columns(Table):
    """Names of the columns of a dataset: the column of messages, or those of a prompt and its completion."""

    messages: OneLine | None = Field(None, min_length=1, description="Column with the messages of a conversation.")
    tools: OneLine | None = Field(None, min_length=1, description="Column with the tools of a conversation.")
    prompt: OneLine | None = Field(None, min_length=1, description="Column with the prompt.")
    completion: OneLine | None = Field(None, min_length=1, description="Column with the completion, which is trained.")


class Data(Table):
    """The training data."""

    kind: Literal["squad", "synthetic", "jsonl", "chat", "hf"] = Field(
        "squad",
        description='"squad": SQuAD from the Hugging Face hub, as in the recipe. "synthetic": generated text with the shape '
        'of SQuAD, without a network. "jsonl": inputs and outputs in the file at data.path. "chat": conversations in the '
        'file at data.path. "hf": a dataset of the Hugging Face hub, or at data.path.',
    )
    path: OneLine | None = Field(
        None,
        description='File for kind = "jsonl" or "chat": each line is a JSON object with the keys "input" and "output", or '
        '"messages". File or folder for kind = "hf".',
    )
    dataset: OneLine | None = Field(
        None, min_length=1, description='Name of the dataset on the Hugging Face hub for kind = "hf", such as org/name.'
    )
    revision: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")] | None = Field(
        None, description="Commit of that dataset: 40 hexadecimal digits. Required with data.dataset."
    )
    config: OneLine | None = Field(None, min_length=1, description='Configuration of the dataset for kind = "hf".')
    split: OneLine = Field("train", min_length=1, description='Split of the dataset for kind = "hf".')
    columns: Columns = Field(
        default_factory=Columns,
        description='Columns of the dataset for kind = "hf". Default: messages (and tools), or else prompt and completion.',
    )
    chat_template: OneLine | None = Field(
        None,
        min_length=1,
        description="File with a chat template in Jinja, relative to this file. Default: the template of the tokenizer.",
    )
    too_long: Literal["error", "drop", "truncate"] | None = Field(
        None,
        description='Examples with more than seq_length tokens. "error": refuse them, with their lines. "drop": leave them '
        'out. "truncate": cut the end of an input or of a conversation. Default: error; for squad and synthetic truncate, '
        "as in the recipe.",
    )
    examples: Positive = Field(14000, description='Number of examples to generate for kind = "synthetic".')
    packed: bool | None = Field(
        None,
        description="Pack examples into full sequences, so that a step has almost no padding. "
        "Default: true on GPUs, false on a CPU.",
    )


class Checkpoint(Table):
    """Where the weights come from. The catalogue has the default of each model."""

    source: Literal["hub", "random", "directory"] | None = Field(
        None,
        description='"hub": the Hugging Face repository of the model. "random": random weights, to measure only speed. '
        '"directory": a Hugging Face checkpoint at checkpoint.path.',
    )
    revision: OneLine | None = Field(None, description='Branch, tag or commit for source = "hub". Default: main.')
    path: OneLine | None = Field(None, description='Directory of the checkpoint for source = "directory".')


class Source(Table):
    """A Git repository at one commit."""

    url: OneLine = Field(description="URL of the repository.")
    commit: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")] = Field(
        description="Commit hash: 40 hexadecimal digits."
    )


class Sources(Table):
    """Source trees that replace the installed packages. `ftgen setup SPEC` clones them into $STAGE_PATH."""

    megatron_lm: Source | None = Field(None, description="Source tree of Megatron-LM.")
    nemo: Source | None = Field(None, description="Source tree of NeMo.")


class Optimizer(Table):
    """Adam with a cosine schedule, as in NeMo's recipe."""

    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate. Default: 1e-4 for LoRA and 5e-6 for SFT, as in the recipe."
    )
    warmup_steps: int = Field(50, ge=0, description="Steps over which the learning rate rises to its peak.")


def _optimization(title: str) -> Any:
    return Field(None, description=f"{title}. Default: on if preset enables it for the scheme, precision and GPU.")


class Optimizations(Table):
    """Changes to the engine's stock recipe that make a step faster. The catalogue tells how each changes the numerics."""

    preset: Literal["measured", "stock"] = Field(
        "measured", description='"measured": on where measurements showed a gain. "stock": off, as in the engine\'s recipe.'
    )
    cuda_graphs: bool | None = _optimization("Runs the transformer layers as CUDA graphs")
    fused_cross_entropy: bool | None = _optimization("Uses Transformer Engine's fused cross entropy")
    loss_tokens_only: bool | None = _optimization("Computes the LM head and the loss only for tokens that have a loss")
    loss_tokens_in_last_layer: bool | None = _optimization(
        "Computes what follows the last layer's attention only for tokens that have a loss"
    )
    scale_small_tensor: bool | None = _optimization("Applies LoRA's scale to the small tensor between its two matrices")
    fused_wgrad_accumulation: bool | None = _optimization("Accumulates weight gradients in the GEMM that computes them")
    skip_nan_check: bool | None = _optimization("Does not check the gradients of each step for NaN")
    async_step: bool | None = _optimization("Launches a step while the GPU is at the step before")
    fused_swiglu: bool | None = _optimization("Uses Transformer Engine's fused SwiGLU, which includes the cast to FP8")
    early_gather: bool | None = _optimization("SFT: starts all gathers of weights when the optimizer's step ends")
    bf16_grads_in_adam: bool | None = _optimization("SFT: lets Adam read the BF16 gradients instead of a float32 copy")
    skip_shard_transposes: bool | None = _optimization("Does not transpose the shards of FP8 weights")
    short_padding: bool | None = _optimization("Divides the padding of a pack into several short sequences")
    fused_rotary: bool | None = _optimization("Splits and rotates queries and keys with a kernel of ftgen, in Triton")
    short_attention: bool | None = _optimization(
        "Computes the attention of short sequences with kernels of ftgen, in Triton"
    )
    fused_lora_add: bool | None = _optimization("Adds LoRA's branch in the GEMM that computes it")
    fused_residual_add: bool | None = _optimization("Adds the residual's gradient in the norm's backward pass")
    fp8_swiglu: bool | None = _optimization("Writes SwiGLU's FP8 result and gradient with kernels of ftgen, in Triton")
    merge_micro_batches: bool | None = _optimization("Trains on all packs of a GPU in one micro-batch per step")
    op_fuser: bool | None = _optimization("Uses Transformer Engine's op fuser, which rounds differently")


class Profile(Table):
    """A profiler that records some steps of some ranks. It slows these steps down, so they must not be timed steps."""

    tool: Literal["nsys", "pytorch"] = Field(
        "nsys", description='"nsys": Nsight Systems, installed on the node. "pytorch": torch.profiler, for a Chrome trace.'
    )
    first_step: int = Field(10, ge=0, description="First step to record. Steps are counted from 0.")
    last_step: int = Field(12, ge=0, description="Last step to record.")
    ranks: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field([0], min_length=1, description="Ranks to record.")


class Save(Table):
    """Checkpoints of the training. With this table, a job that was interrupted goes on where it was."""

    every_steps: Positive = Field(
        100, description="Steps from one checkpoint to the next. The last step, and a run that must stop, are saved too."
    )
    keep: Positive = Field(
        2, description="Number of checkpoints to keep, the newest ones. The disk needs room for one more."
    )


class Export(Table):
    """The trained model in Hugging Face format, made and checked after the last step. It requires [save]."""

    what: list[Literal["merged", "adapter"]] = Field(
        ["merged"],
        min_length=1,
        description='"merged": the whole model; with LoRA, the adapters are merged into the weights of the base. '
        '"adapter": only the adapters, in the format of PEFT. It requires scheme = "lora".',
    )


class Wandb(Table):
    """Weights & Biases. Its key comes from the environment: WANDB_API_KEY."""

    project: OneLine = Field(min_length=1, description="Name of the project.")


class Mlflow(Table):
    """MLflow. Its server comes from the environment: MLFLOW_TRACKING_URI. Default: files in the run directory."""

    experiment: OneLine = Field(min_length=1, description="Name of the experiment.")


class Log(Table):
    """Trackers that get the metrics of the training too. The log of the job stays the source of all results."""

    tensorboard: bool = Field(False, description="Write files for TensorBoard into the run directory.")
    wandb: Wandb | None = Field(None, description="Weights & Biases. Without a key or a network, it writes files.")
    mlflow: Mlflow | None = Field(None, description="MLflow. Without MLFLOW_TRACKING_URI, it writes files.")


class Validation(Table):
    """Loss on held-out examples. Default: the 5% of the examples that no training uses."""

    file: OneLine | None = Field(
        None, description="JSONL file with the held-out examples. The training then uses all of its own data."
    )
    fraction: float | None = Field(
        None, gt=0, lt=1, description="Fraction of the data that is held out, if there is no file. Default: 0.05."
    )
    every_steps: Positive = Field(100, description="Steps from one validation to the next. The last step is validated too.")


class Window(Table):
    """The steps whose mean is the reported step time."""

    last_steps: Positive = Field(20, description="Number of timed steps at the end of the run.")


class Matrix(Table):
    """Many experiments from one spec. Each point of the matrix is an experiment and has a name."""

    product: dict[str, Any] = Field({}, description="Keys with lists of values. Every combination of values is a point.")
    zip: dict[str, Any] = Field({}, description="Keys with lists of one length. The values at each position are a point.")
    exclude: list[dict[str, Any]] = Field([], description="Points to leave out, by some of their values.")
    include: list[dict[str, Any]] = Field([], description="Points to add, with the keys that they set.")
    name: OneLine | None = Field(
        None,
        min_length=1,
        description='Name of each experiment, with keys in braces: "{scheme}_{precision}_{gpus}". '
        "Default: the name of the file and the values that vary.",
    )


class Spec(Table):
    """One fine-tuning benchmark. Only scheme, precision and gpus have no default. The defaults are those of the recipe."""

    scheme: Literal["sft", "lora"] = Field(description='"sft": train all weights. "lora": train low-rank adapters.')
    precision: Literal["bf16", "fp8", "fp32"] = Field(
        description='Precision of the matrix products. "fp8": BF16 with FP8 products. "fp32": only on a CPU.'
    )
    fp8_scaling: Literal["delayed", "current"] | None = Field(
        None,
        description='How FP8 values are scaled. "delayed": by the values of earlier steps, as in the recipe of NeMo. '
        '"current": by the values themselves, as in those of Megatron-Bridge. Default: that of the engine.',
    )
    engine: Literal["nemo", "megatron_bridge"] = Field(
        "nemo", description='What trains. "nemo": NeMo 2, as in the recipe. "megatron_bridge": Megatron-Bridge.'
    )
    gpus: Positive = Field(description="Total number of GPUs: whole nodes, or a part of one node.")
    model: Name = Field("llama3_8b", description="Name of the model in the catalogue.")
    gpu: Name = Field("h100", description='Name of the GPU in the catalogue. "cpu" trains without a GPU.')
    gpus_per_node: Positive | None = Field(None, description="GPUs of each node. Default: that of the site profile.")
    max_steps: Positive | None = Field(None, description="Number of training steps. Default: 100, unless epochs is set.")
    epochs: Positive | None = Field(
        None,
        description="Number of times that every example is trained, each time in another order. The job computes the steps. "
        "Replaces max_steps.",
    )
    global_batch_size: Positive | None = Field(None, description="Sequences per step. Default: 4 x gpus.")
    micro_batch_size: Positive = Field(1, description="Sequences that a GPU processes at a time.")
    seq_length: Positive = Field(4096, description="Tokens per sequence.")
    seed: int = Field(1234, ge=1, lt=2**31, description="Seed for initial weights and for the order of the data.")
    walltime: Walltime = Field("00:30:00", description="Time limit of the job, as [days-]hours:minutes:seconds.")
    convert_walltime: Walltime = Field(
        "02:00:00", description="Time limit of the checkpoint conversion with its download, as [days-]hours:minutes:seconds."
    )
    lora: Lora = Field(default_factory=Lora, description="Settings of the LoRA adapters.")
    parallelism: Parallelism = Field(default_factory=Parallelism, description="How the model is split over GPUs.")
    data: Data = Field(default_factory=Data, description="The training data.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="Where the weights come from.")
    sources: Sources = Field(default_factory=Sources, description="Source trees that replace installed packages.")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="Settings of Adam.")
    optimizations: Optimizations = Field(
        default_factory=Optimizations, description="Changes to the stock recipe that make a step faster."
    )
    window: Window = Field(default_factory=Window, description="The timed steps.")
    save: Save | None = Field(None, description="Checkpoints of the training. Default: none, as in the recipe.")
    validation: Validation | None = Field(None, description="Loss on held-out examples. Default: none, as in the recipe.")
    export: Export | None = Field(None, description="The trained model in Hugging Face format. Default: none.")
    log: Log | None = Field(None, description="Trackers. Default: none.")
    profile: Profile | None = Field(None, description="Profiler for some steps. Default: none.")
    environment: Environment = Field(
        {},
        description="Environment variables of the training. They override those of the recipe and of the site profile. "
        "$NAME and ${NAME} stand for variables of the job, and $$ for a dollar. Nothing else is expanded.",
    )
    extends: OneLine | None = Field(
        None,
        min_length=1,
        description="Path of a base spec, relative to this file. This spec inherits its keys and can override them.",
    )
    catalogue: OneLine | None = Field(
        None, min_length=1, description="Path of a user catalogue, relative to this file: [models.NAME], [gpus.NAME]."
    )
    matrix: Matrix | None = Field(None, description="Many experiments from this spec.")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a spec, for editors. Keys that a base spec or a matrix can set are not required."""
    schema = Spec.model_json_schema()
    needed = schema.pop("required")
    return schema | {"anyOf": [{"required": needed}, {"required": ["extends"]}, {"required": ["matrix"]}]}
