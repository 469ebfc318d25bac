"""Every number of a run, resolved once: spec + site + catalogue to a frozen `Plan`. Pure.

The job obeys the plan, its log directory keeps a copy, the tables read that copy. Which key decides which number,
and what stands in where no key does, is `origins`; what cannot be is refused by `rules`.
"""

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from ftgen import __version__, catalogue
from ftgen.catalogue import Gpu, Model
from ftgen.errors import SpecError
from ftgen.plan.rules import broken_rules, forbids, global_batch_size, is_packed
from ftgen.spec.site import Site
from ftgen.spec.spec import Spec
from ftgen.units import parse_walltime

FORMAT = 1  # of plan.json

# The environment of the recipe's training tasks (its public launcher, release 25.02).
RECIPE_ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "NVTE_ASYNC_AMAX_REDUCTION": "1",
    "NVTE_DP_AMAX_REDUCE_INTERVAL": "0",
    "NVTE_FLASH_ATTN": "1",
    "NVTE_FUSED_ATTN": "1",
    "TOKENIZERS_PARALLELISM": "False",
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
}
RECIPE_LEARNING_RATE = {"lora": 1e-4, "sft": 5e-6}  # nemo.collections.llm.recipes.llama3_8b.finetune_recipe


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


def resolve(
    spec: Spec,
    site: Site,
    *,
    name: str,
    spec_file: str = "",
    spec_text: str = "",
    point: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
    own: catalogue.UserCatalogue | None = None,
) -> Plan:
    """The plan of a spec at a site; SpecError with every rule it breaks."""
    known = own or catalogue.UserCatalogue({}, {})
    model = known.models.get(spec.model) or catalogue.models().get(spec.model)
    gpu = known.gpus.get(spec.gpu) or catalogue.gpus().get(spec.gpu)
    spec = split_as_catalogued(spec, model, gpu)
    problems = broken_rules(spec, site, model, gpu)
    if problems or not model or not gpu:
        raise SpecError(*problems)
    gpus_per_node = spec.gpus_per_node or site.gpus_per_node
    return Plan(
        format=FORMAT,
        ftgen_version=__version__,
        name=name,
        experiment=f"{spec.scheme}_nemo_{spec.model}_{spec.precision}_{spec.gpus}",
        spec_file=spec_file or f"{name}.toml",
        spec_sha256=sha256(spec_text.encode()).hexdigest(),
        point=point or {},
        overrides=overrides or {},
        scheme=spec.scheme,
        precision=spec.precision,
        model=_model(model, spec.seq_length),
        checkpoint=_checkpoint(spec, model),
        lora=LoraPlan(**dict(spec.lora)) if spec.scheme == "lora" else None,
        gpu=GpuPlan(gpu.name, gpu.memory_gib, gpu.peak_flops(spec.precision)),
        gpus=spec.gpus,
        nodes=max(1, spec.gpus // gpus_per_node),
        gpus_per_node=min(spec.gpus, gpus_per_node),
        max_steps=spec.max_steps,
        global_batch_size=global_batch_size(spec),
        micro_batch_size=spec.micro_batch_size,
        seq_length=spec.seq_length,
        seed=spec.seed,
        parallelism=_parallelism(spec),
        data=_data(spec),
        optimizer=OptimizerPlan(
            spec.optimizer.learning_rate or RECIPE_LEARNING_RATE[spec.scheme], spec.optimizer.warmup_steps
        ),
        optimizations=_optimizations(spec),
        profile=ProfilePlan(**dict(spec.profile)) if spec.profile else None,
        window_steps=spec.window.last_steps,
        environment=RECIPE_ENVIRONMENT | site.environment | spec.environment,
        sources=_sources(spec),
        stage_path=site.stage_path,
        modules=site.modules,
        python=_python(site),
        slurm=_slurm(spec, site),
    )


def split_as_catalogued(spec: Spec, model: Model | None, gpu: Gpu | None) -> Spec:
    """The spec with the catalogue's split of the model, where it says none of its own."""
    row = model.split(spec.scheme, gpu.memory_gib) if model and gpu else None
    if row is None or spec.parallelism.model_fields_set:
        return spec
    split = {key: getattr(row, key) for key in type(spec.parallelism).model_fields}
    return spec.model_copy(update={"parallelism": spec.parallelism.model_copy(update=split)})


def _model(model: Model, seq_length: int) -> ModelPlan:
    given = {key: getattr(model, key) for key in ModelPlan.__dataclass_fields__ if hasattr(model, key)}
    return ModelPlan(**given | {"flops_per_sample": model.flops(seq_length)})


def _checkpoint(spec: Spec, model: Model) -> CheckpointPlan:
    source = spec.checkpoint.source or model.checkpoint
    places = {
        "hub": model.hf_id if not spec.checkpoint.revision else f"{model.hf_id}@{spec.checkpoint.revision}",
        "random": f"random/{model.name}-{spec.seed}",
        "directory": f"directory/{sha256(str(spec.checkpoint.path).encode()).hexdigest()[:12]}",
    }
    gated = source == "hub" and model.gated
    return CheckpointPlan(source, spec.checkpoint.revision, spec.checkpoint.path, gated, places[source])


def _sources(spec: Spec) -> list[SourcePlan]:
    trees = {"Megatron-LM": spec.sources.megatron_lm, "NeMo": spec.sources.nemo}
    return [SourcePlan(it.url, it.commit, f"{name}-{it.commit[:12]}") for name, it in trees.items() if it]


def _parallelism(spec: Spec) -> ParallelismPlan:
    split = spec.parallelism
    shared = split.tensor_model_parallel_size * split.pipeline_model_parallel_size * split.context_parallel_size
    return ParallelismPlan(**dict(split), data_parallel_size=spec.gpus // shared)


def _data(spec: Spec) -> DataPlan:
    return DataPlan(spec.data.kind, spec.data.path, spec.data.examples, is_packed(spec))


def _python(site: Site) -> PythonPlan:
    shared = [f"{path}:{path}" for path in site.shared_paths if site.python.image]
    return PythonPlan(**dict(site.python) | {"mounts": shared + site.python.mounts})


def _optimizations(spec: Spec) -> dict[str, bool]:
    """What the spec says of each, else where measurements put it on and the run allows it."""
    chosen = {}
    for name, known in catalogue.optimizations().items():
        said = getattr(spec.optimizations, name)
        measured = spec.optimizations.preset == "measured" and known.is_default(spec.scheme, spec.precision, spec.gpu)
        chosen[name] = said if said is not None else measured and not forbids(name, spec)
    return chosen


def _slurm(spec: Spec, site: Site) -> SlurmPlan:
    given = {key: getattr(site, key) for key in SlurmPlan.__dataclass_fields__ if hasattr(site, key)}
    walltime_s = parse_walltime(spec.walltime)
    return SlurmPlan(
        **given | {"end_before_limit_s": min(site.end_before_limit_s, walltime_s // 4)},
        walltime_s=walltime_s,
        convert_walltime_s=parse_walltime(spec.convert_walltime),
    )
