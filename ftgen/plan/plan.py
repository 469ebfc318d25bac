"""Defines the frozen plan of one run: every number that the job and the tables need.

In: nothing; `resolve` fills the plan. Out: `Plan` and its parts, and `Plan.to_json`, the text that travels with the job.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

FORMAT = 1  # of plan.json


@dataclass(frozen=True)
class ModelPlan:
    """What is trained: the catalogue's entry, as far as the job needs it."""

    name: str
    hf_id: str
    nemo_recipe: str  # module in nemo.collections.llm.recipes
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_size: int
    vocab_size: int
    max_position_embeddings: int  # tokens
    rope_theta: float
    rope_scaling_factor: float | None  # Llama 3.1's
    tied_embeddings: bool
    qkv_bias: bool
    parameters: int
    flops_per_sample: float  # SFT, forward and backward, one sequence of seq_length tokens


@dataclass(frozen=True)
class CheckpointPlan:
    """Where the weights come from and where, below $NEMO_HOME/models, the converted ones are kept."""

    source: str  # hub, random, directory
    revision: str | None
    path: str | None
    gated: bool
    place: str  # org/name


@dataclass(frozen=True)
class LoraPlan:
    """The adapters."""

    rank: int
    alpha: int
    dropout: float
    targets: list[str]


@dataclass(frozen=True)
class GpuPlan:
    """The accelerator and the dense peak that the MFU refers to."""

    name: str
    memory_gib: float
    peak_flops: float | None  # FLOP/s of one GPU in the run's precision


@dataclass(frozen=True)
class ParallelismPlan:
    """GPUs by what they share."""

    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    context_parallel_size: int
    virtual_pipeline_model_parallel_size: int | None
    sequence_parallel: bool
    data_parallel_size: int


@dataclass(frozen=True)
class DataPlan:
    """What is trained on."""

    kind: str  # squad, synthetic, jsonl
    path: str | None
    examples: int
    packed: bool


@dataclass(frozen=True)
class OptimizerPlan:
    """Adam with a cosine schedule."""

    learning_rate: float
    warmup_steps: int


@dataclass(frozen=True)
class SourcePlan:
    """A source tree that comes first on the job's path."""

    url: str
    commit: str
    folder: str  # below STAGE_PATH


@dataclass(frozen=True)
class ProfilePlan:
    """What is recorded, in $FTGEN_RUN_DIR/profile."""

    tool: str  # nsys, pytorch
    first_step: int
    last_step: int
    ranks: list[int]


@dataclass(frozen=True)
class PythonPlan:
    """Where the job's Python comes from: none (the shell's), venv, container or apptainer."""

    kind: str
    path: str | None
    image: str | None
    image_from: str | None  # what setup makes the image of
    mounts: list[str]  # shared_paths among them
    writable: bool
    mount_home: bool


@dataclass(frozen=True)
class SlurmPlan:
    """What Slurm is asked for; None leaves it to the submitting shell or to Slurm."""

    partition: str | None
    account: str | None
    qos: str | None
    reservation: str | None
    constraint: str | None
    gpu_request: str
    gpu_type: str | None
    mpi: str
    exclusive: bool
    mem: str | None
    requeue: bool | None
    end_before_limit_s: int
    convert: str  # job, task: where a missing checkpoint is made
    convert_flags: list[str]
    sbatch_flags: list[str]
    srun_flags: list[str]
    walltime_s: int
    convert_walltime_s: int


@dataclass(frozen=True)
class Plan:
    """One run, every number of it."""

    format: int
    ftgen_version: str
    name: str  # the experiment's own: the spec's, or of the point of its matrix
    experiment: str  # {scheme}_nemo_{model}_{precision}_{gpus}, the recipe's name for it
    spec_file: str
    spec_sha256: str  # of the text of the spec, after that of those it extends
    point: dict[str, Any]  # what the spec's matrix sets
    overrides: dict[str, Any]  # what --set said
    scheme: str  # sft, lora
    precision: str  # bf16, fp8, fp32
    model: ModelPlan
    checkpoint: CheckpointPlan
    lora: LoraPlan | None
    gpu: GpuPlan
    gpus: int
    nodes: int
    gpus_per_node: int  # tasks on each node
    max_steps: int
    global_batch_size: int
    micro_batch_size: int
    seq_length: int
    seed: int
    parallelism: ParallelismPlan
    data: DataPlan
    optimizer: OptimizerPlan
    optimizations: dict[str, bool]  # by the catalogue's names
    profile: ProfilePlan | None
    window_steps: int  # the last steps, whose mean is the step time
    environment: dict[str, str]
    sources: list[SourcePlan]
    stage_path: str | None
    modules: list[str]
    python: PythonPlan
    slurm: SlurmPlan

    def to_json(self) -> str:
        """The plan as it travels with the job, for people to read too."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=True)
