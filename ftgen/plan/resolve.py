"""Resolves a spec to a plan: computes every number once, from the spec, the site profile and the catalogue.

In: a `Spec`, a `Site`, a `UserCatalogue`. Out: a frozen `Plan`, or a `SpecError` with every broken rule. Pure.
"""

from hashlib import sha256
from typing import Any

from ftgen import __version__, catalogue
from ftgen.catalogue import Gpu, Model
from ftgen.errors import SpecError
from ftgen.plan import checkpoints, memory
from ftgen.plan.data_rules import is_packed, max_steps, order, too_long
from ftgen.plan.engine_rules import fp8_scaling, is_on
from ftgen.plan.images import image_for, import_name
from ftgen.plan.plan import (
    FORMAT,
    CheckpointPlan,
    DataPlan,
    ExportPlan,
    GpuPlan,
    LogPlan,
    LoraPlan,
    ModelPlan,
    NodeCheckPlan,
    OptimizerPlan,
    ParallelismPlan,
    Plan,
    PricePlan,
    ProfilePlan,
    PythonPlan,
    SavePlan,
    SlurmPlan,
    SourcePlan,
    ValidationPlan,
)
from ftgen.plan.rules import HELD_OUT, broken_rules, global_batch_size, gpus_of_a_node
from ftgen.spec.site import Site
from ftgen.spec.spec import Spec
from ftgen.units import parse_walltime

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


def resolve(
    spec: Spec,
    site: Site,
    *,
    name: str,
    spec_file: str = "",
    spec_text: str = "",
    point: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
    user_catalogue: catalogue.UserCatalogue | None = None,
    chat_template: str | None = None,
) -> Plan:
    """The plan of a spec at a site; SpecError with every broken rule. `chat_template` is the text of the file."""
    spec, model, gpu = _checked(spec, site, user_catalogue or catalogue.UserCatalogue({}, {}))
    gpus_per_node = gpus_of_a_node(spec, site, gpu)
    model_plan = _model(model, spec.seq_length)
    lora = LoraPlan(**dict(spec.lora)) if spec.scheme == "lora" else None
    save = _save(spec, model_plan, lora)
    return Plan(
        format=FORMAT,
        ftgen_version=__version__,
        name=name,
        experiment=f"{spec.scheme}_{spec.engine}_{spec.model}_{spec.precision}_{spec.gpus}",
        spec_file=spec_file or f"{name}.toml",
        spec_sha256=sha256(spec_text.encode()).hexdigest(),
        point=point or {},
        overrides=overrides or {},
        engine=spec.engine,
        scheme=spec.scheme,
        precision=spec.precision,
        fp8_scaling=fp8_scaling(spec),
        model=model_plan,
        checkpoint=_checkpoint(spec, model),
        lora=lora,
        gpu=GpuPlan(gpu.name, gpu.memory_gib, gpu.peak_flops(spec.precision)),
        gpus=spec.gpus,
        nodes=max(1, spec.gpus // gpus_per_node),
        gpus_per_node=min(spec.gpus, gpus_per_node),
        max_steps=max_steps(spec),
        epochs=spec.epochs,
        global_batch_size=global_batch_size(spec),
        micro_batch_size=spec.micro_batch_size,
        seq_length=spec.seq_length,
        seed=spec.seed,
        parallelism=_parallelism(spec),
        data=_data(spec, chat_template),
        optimizer=OptimizerPlan(
            spec.optimizer.learning_rate or RECIPE_LEARNING_RATE[spec.scheme], spec.optimizer.warmup_steps
        ),
        optimizations={name: is_on(name, spec) for name in catalogue.optimizations()},
        profile=ProfilePlan(**dict(spec.profile)) if spec.profile else None,
        window_steps=spec.window.last_steps,
        environment=RECIPE_ENVIRONMENT | site.environment | spec.environment,
        sources=_sources(spec),
        stage_path=site.stage_path,
        modules=site.modules,
        setup_lines=site.setup_lines,
        prefix=site.prefix,
        python=python_of(site),
        slurm=_slurm(spec, site, gpus_per_node, save),
        save=save,
        validation=_validation(spec),
        export=ExportPlan(**dict(spec.export)) if spec.export else None,
        log=LogPlan(**spec.log.model_dump()) if spec.log else None,
        node_check=_node_check(site, gpu),
        telemetry=site.telemetry,
        price=_price(site),
    )


def _checked(spec: Spec, site: Site, known: catalogue.UserCatalogue) -> tuple[Spec, Model, Gpu]:
    """The spec with its split, and its model and GPU of the catalogues; SpecError with every broken rule."""
    model = known.models.get(spec.model) or catalogue.models().get(spec.model)
    gpu = known.gpus.get(spec.gpu) or catalogue.gpus().get(spec.gpu)
    spec = with_split(spec, model, gpu)
    problems = broken_rules(spec, site, model, gpu)
    if problems or not model or not gpu:
        raise SpecError(*problems)
    return spec, model, gpu


def _price(site: Site) -> PricePlan | None:
    if site.price_per_gpu_hour is None or site.currency is None:
        return None
    return PricePlan(site.price_per_gpu_hour, site.currency)


def _node_check(site: Site, gpu: Gpu) -> NodeCheckPlan:
    known = {"driver_name": gpu.driver_name, "peak_bf16_tflops": gpu.peak_tflops.get("bf16"), **(gpu.expected or {})}
    return NodeCheckPlan(**dict(site.node_check), expected={key: value for key, value in known.items() if value is not None})


def with_split(spec: Spec, model: Model | None, gpu: Gpu | None) -> Spec:
    """The spec with the split that the catalogue has for the model, if the spec does not set `parallelism`."""
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
    place = places[source] if spec.engine == "nemo" else f"{spec.engine}/{places[source]}"
    return CheckpointPlan(source, spec.checkpoint.revision, spec.checkpoint.path, gated, place)


def _sources(spec: Spec) -> list[SourcePlan]:
    trees = {"Megatron-LM": spec.sources.megatron_lm, "NeMo": spec.sources.nemo}
    return [SourcePlan(it.url, it.commit, f"{name}-{it.commit[:12]}") for name, it in trees.items() if it]


def _parallelism(spec: Spec) -> ParallelismPlan:
    split = spec.parallelism
    shared = split.tensor_model_parallel_size * split.pipeline_model_parallel_size * split.context_parallel_size
    return ParallelismPlan(**dict(split), data_parallel_size=spec.gpus // shared)


def _data(spec: Spec, chat_template: str | None) -> DataPlan:
    own = {
        "columns": dict(spec.data.columns),
        "packed": is_packed(spec),
        "chat_template": chat_template,
        "too_long": too_long(spec),
        "order": order(spec),
    }
    return DataPlan(**dict(spec.data) | own)


def python_of(site: Site) -> PythonPlan:
    """Where the Python of the site's jobs comes from: names of images as the program wants them, mounts, defaults."""
    python = site.python
    shared = [f"{path}:{path}" for path in site.shared_paths if python.image]
    # enroot mounts an image read-only unless its configuration changes that (ENROOT_ROOTFS_WRITABLE); NVIDIA's launchers
    # therefore always pass --container-writable (Megatron-Bridge, scripts/performance/utils/executors.py)
    writable = python.kind == "container" if python.writable is None else python.writable
    return PythonPlan(
        **{key: value for key, value in python if key != "image_fits"}  # a rule alone reads it
        | {
            "image": image_for(python.kind, python.image) if python.image else python.image,
            "image_from": import_name(python.kind, python.image_from) if python.image_from else python.image_from,
            "mounts": shared + python.mounts,
            "writable": writable,
        }
    )


def memory_of_a_node(site: Site) -> str | None:
    """The value of --mem; None if the job does not request the memory of a node."""
    if site.mem is None and not site.mem_per_cpu and not site.mem_per_gpu:
        return "0" if site.exclusive else None
    return None if site.mem == "none" else site.mem


def _save(spec: Spec, model: ModelPlan, lora: LoraPlan | None) -> SavePlan | None:
    if not spec.save:
        return None
    trained = memory.adapter_weights(model, lora) if lora else model.parameters
    return SavePlan(**dict(spec.save), checkpoint_bytes=checkpoints.size(trained, spec.precision))


def _validation(spec: Spec) -> ValidationPlan | None:
    asked = spec.validation
    if not asked:
        return None
    fraction = None if asked.file else asked.fraction or HELD_OUT
    return ValidationPlan(asked.file, fraction, asked.every_steps)


def _slurm(spec: Spec, site: Site, gpus_per_node: int, save: SavePlan | None) -> SlurmPlan:
    given = {key: getattr(site, key) for key in SlurmPlan.__dataclass_fields__ if hasattr(site, key)}
    walltime_s = parse_walltime(spec.walltime)
    nodes = max(1, spec.gpus // gpus_per_node)
    lead_s = site.end_before_limit_s
    if save and "end_before_limit_s" not in site.model_fields_set:
        lead_s += checkpoints.slow_save_s(save.checkpoint_bytes)
    return SlurmPlan(
        **given
        | {
            "end_before_limit_s": min(lead_s, walltime_s // 4),
            "mem": memory_of_a_node(site),
            "segment": min(site.segment, nodes) if site.segment and nodes > 1 else None,
        },
        walltime_s=walltime_s,
        convert_walltime_s=parse_walltime(spec.convert_walltime),
    )
