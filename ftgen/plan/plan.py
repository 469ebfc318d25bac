"""Defines the frozen plan of one run: every number that the job and the tables need.

In: the values that `resolve` computes. Out: a `Plan`, and its JSON (`str`), which the job carries.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

FORMAT = 1  # version of plan.json
# Tables that the recipe does not have: a plan without them is as it was before them.
OPTIONAL = ("save", "validation", "export", "log", "price")


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

    kind: str  # squad, synthetic, jsonl, chat, hf
    path: str | None
    dataset: str | None  # on the hub
    revision: str | None
    config: str | None
    split: str
    columns: dict[str, str | None]
    examples: int
    packed: bool
    chat_template: str | None  # the text of the file
    too_long: str  # error, drop, truncate
    order: str  # recipe: the engine packs and orders the examples; epochs: ftgen does


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
class SavePlan:
    """When the training is saved. The checkpoints are in $FTGEN_RUN_DIR/checkpoints."""

    every_steps: int
    keep: int  # checkpoints
    checkpoint_bytes: int  # estimated size of one checkpoint


@dataclass(frozen=True)
class ValidationPlan:
    """The held-out examples, and when their loss is computed."""

    file: str | None  # None: a fraction of the data
    fraction: float | None  # None: a file
    every_steps: int


@dataclass(frozen=True)
class ExportPlan:
    """What is exported after the last step, into $FTGEN_RUN_DIR/exports."""

    what: list[str]  # merged, adapter


@dataclass(frozen=True)
class LogPlan:
    """Trackers that get the metrics of the training."""

    tensorboard: bool
    wandb: dict[str, str] | None  # project
    mlflow: dict[str, str] | None  # experiment


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
class NodeCheckPlan:
    """The check of each node before the training."""

    on: bool
    bad: str  # warn, stop: what becomes of a run with a node that is not well
    expected: dict[str, Any]  # of a GPU, as far as the catalogue has it; with its peak_bf16_tflops and driver_name


@dataclass(frozen=True)
class PricePlan:
    """What a GPU costs."""

    per_gpu_hour: float
    currency: str


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
    max_steps: int | None  # None: epochs decides
    epochs: int | None
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
    node_check: NodeCheckPlan
    telemetry: bool  # record power and clocks of the GPUs
    slurm: SlurmPlan
    save: SavePlan | None = None
    validation: ValidationPlan | None = None
    export: ExportPlan | None = None
    log: LogPlan | None = None
    price: PricePlan | None = None

    def document(self) -> dict[str, Any]:
        """The plan as a document. It has the keys of OPTIONAL only if the spec or the site profile has them."""
        return {key: value for key, value in asdict(self).items() if value is not None or key not in OPTIONAL}

    def to_json(self) -> str:
        """The plan as indented JSON."""
        return json.dumps(self.document(), indent=2, ensure_ascii=True)
