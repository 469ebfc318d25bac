"""Defines the frozen plan of one run: every number that the job and the tables need.

In: the values that `resolve` computes. Out: a `Plan`, and its JSON (`str`), which the job carries.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

FORMAT = 1  # version of plan.json


@dataclass(frozen=True)
class ModelPlan:
    """The model: those fields of its catalogue entry that the job needs."""

    name: str
    hf_id: str
    nemo_recipe: str  # module in nemo.collections.llm.recipes
    megatron_bridge_recipe: str | None  # module in megatron.bridge.recipes, and the name of the model there
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_size: int
    vocab_size: int
    max_position_embeddings: int  # tokens
    rope_theta: float
    rope_scaling_factor: float | None  # of Llama 3.1
    tied_embeddings: bool
    qkv_bias: bool
    parameters: int
    flops_per_sample: float  # SFT, forward and backward, one sequence of seq_length tokens


@dataclass(frozen=True)
class CheckpointPlan:
    """Where the weights come from, and the folder of the converted weights."""

    source: str  # hub, random, directory
    revision: str | None
    path: str | None
    gated: bool
    place: str  # folder in $NEMO_HOME/models, such as org/name; it depends on the engine


@dataclass(frozen=True)
class LoraPlan:
    """Settings of the LoRA adapters."""

    rank: int
    alpha: int
    dropout: float
    targets: list[str]


@dataclass(frozen=True)
class GpuPlan:
    """The GPU, and the dense peak that the MFU refers to."""

    name: str
    memory_gib: float
    peak_flops: float | None  # FLOP/s of one GPU in the run's precision


@dataclass(frozen=True)
class ParallelismPlan:
    """How the model is split over GPUs."""

    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    context_parallel_size: int
    virtual_pipeline_model_parallel_size: int | None
    sequence_parallel: bool
    data_parallel_size: int


@dataclass(frozen=True)
class DataPlan:
    """The training data."""

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
    """A source tree that replaces an installed package."""

    url: str
    commit: str
    folder: str  # in STAGE_PATH


@dataclass(frozen=True)
class ProfilePlan:
    """Steps and ranks to profile. The profiles are in $FTGEN_RUN_DIR/profile."""

    tool: str  # nsys, pytorch
    first_step: int
    last_step: int
    ranks: list[int]


@dataclass(frozen=True)
class PythonPlan:
    """Where the Python of the job comes from."""

    kind: str  # none (python3 of the shell), venv, container, apptainer, singularity
    path: str | None
    image: str | None  # a file, or a name as pyxis or apptainer wants it
    image_from: str | None  # image that `ftgen setup` imports, likewise
    mounts: list[str]  # include shared_paths
    writable: bool
    mount_home: bool
    container_name: bool  # pyxis: one container for all steps of the job
    container_env: list[str]  # pyxis: variables of the job that replace those of the image


@dataclass(frozen=True)
class SlurmPlan:
    """The request to Slurm. None: the submitting shell or Slurm decides."""

    partition: str | None
    account: str | None
    qos: str | None
    reservation: str | None
    constraint: str | None
    gpu_request: str
    gpu_type: str | None
    gres: list[str]  # generic resources other than GPUs
    segment: int | None  # nodes
    mpi: str
    exclusive: bool
    cpus_per_gpu: int | None
    mem: str | None  # of a node
    mem_per_cpu: str | None
    mem_per_gpu: str | None
    requeue: bool | None
    end_before_limit_s: int
    convert: str  # job, task: what converts a missing checkpoint
    convert_flags: list[str]
    job_name_prefix: str | None
    output_folder: str | None
    master_addr: (
        str | list[str] | None
    )  # an address, interface:NAME, or a command that prints it; None: the first node's name
    sbatch_flags: list[str]
    srun_flags: list[str]
    walltime_s: int
    convert_walltime_s: int


@dataclass(frozen=True)
class Plan:
    """Every number of one run."""

    format: int
    ftgen_version: str
    name: str  # of the experiment: file name of the spec, or name of the matrix point
    experiment: str  # {scheme}_{engine}_{model}_{precision}_{gpus}, as in the recipe
    spec_file: str
    spec_sha256: str  # of the texts of the specs that it extends, and of its text
    point: dict[str, Any]  # keys that the matrix sets
    overrides: dict[str, Any]  # keys that --set sets
    engine: str  # nemo, megatron_bridge
    scheme: str  # sft, lora
    precision: str  # bf16, fp8, fp32
    fp8_scaling: str | None  # delayed, current; None: not FP8
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
    optimizations: dict[str, bool]  # on or off, by the names in the catalogue
    profile: ProfilePlan | None
    window_steps: int  # number of timed steps at the end of the run
    environment: dict[str, str]
    sources: list[SourcePlan]
    stage_path: str | None
    modules: list[str]
    setup_lines: list[str]  # bash, before Python
    prefix: list[str]  # words before Python in each task of the training
    python: PythonPlan
    slurm: SlurmPlan

    def to_json(self) -> str:
        """The plan as indented JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=True)
