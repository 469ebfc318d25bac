"""What a spec's keys must satisfy together. In: shapes that are right. Out: every rule broken, with the values found."""

from collections.abc import Iterator

from ftgen.catalogue import Gpu, Model, gpus, models
from ftgen.catalogue import optimizations as catalogue_optimizations
from ftgen.errors import KeyPath, Problem, closest
from ftgen.spec.site import Site
from ftgen.spec.spec import Spec
from ftgen.units import parse_walltime

# What the generated script sets in every task, and therefore no spec or site may.
SET_BY_THE_SCRIPT = {"STAGE_PATH", "NEMO_HOME", "HF_HOME", "HF_TOKEN_PATH", "NEMORUN_HOME", "FTGEN_RUN_DIR", "PATH"}
SET_BY_THE_SCRIPT |= {"RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
# Options of sbatch that are not for sbatch_flags, and who says them.
SAID_ELSEWHERE = {
    **{f"--{key}": f"site.{key}" for key in ("partition", "account", "qos", "reservation", "constraint", "mem")},
    **dict.fromkeys(("--exclusive", "--requeue"), "the site's key of that name"),
    **dict.fromkeys(("--gres", "--gpus-per-node"), "site.gpu_request"),
    **dict.fromkeys(("--nodes", "--ntasks", "--ntasks-per-node", "--gpus"), "gpus, in the spec"),
    **dict.fromkeys(("--job-name", "--dependency", "--output", "--error", "--open-mode", "--array"), "the generated script"),
    "--no-requeue": "site.requeue",
    "--signal": "site.end_before_limit_s",
    "--time": "walltime, in the spec",
}
SET_BY_SRUN = {"--nodes", "--ntasks", "--ntasks-per-node", "--kill-on-bad-exit", "--mpi", "--export", "--output", "--error"}
SET_BY_SRUN |= {"--container-image", "--container-mounts", "--label"}
RECIPE_SEQUENCES_PER_GPU = 4  # of a step: GBS = 4 x GPUs
TP: KeyPath = ("parallelism", "tensor_model_parallel_size")
PP: KeyPath = ("parallelism", "pipeline_model_parallel_size")
CP: KeyPath = ("parallelism", "context_parallel_size")
VP: KeyPath = ("parallelism", "virtual_pipeline_model_parallel_size")
GBS: KeyPath = ("global_batch_size",)


def broken_rules(spec: Spec, site: Site, model: Model | None, gpu: Gpu | None) -> list[Problem]:
    """Every rule that the spec breaks at this site."""
    problems = [
        *_whole_nodes(spec, site),
        *_split(spec),
        *_data(spec),
        *_optimizations(spec),
        *_profile(spec),
        *_rest(spec, site),
    ]
    if model is None:
        problems.append(Problem(("model",), f"is not in the catalogue: {spec.model}", closest(spec.model, models())))
    else:
        problems += _fits_the_model(spec, model)
    if gpu is None:
        problems.append(Problem(("gpu",), f"is not in the catalogue: {spec.gpu}", closest(spec.gpu, gpus())))
    else:
        problems += _fits_the_gpu(spec, gpu)
    return problems


def _whole_nodes(spec: Spec, site: Site) -> Iterator[Problem]:
    key: KeyPath = ("gpus_per_node",) if spec.gpus_per_node else ("site", "gpus_per_node")
    node = spec.gpus_per_node or site.gpus_per_node
    if spec.gpus > node and spec.gpus % node:
        below = spec.gpus // node * node
        yield Problem(
            ("gpus",),
            f"must fill whole nodes: {spec.gpus} is not a multiple of {node} ({'.'.join(map(str, key))})",
            f"use {below} or {below + node}",
            also=(key,),
        )


def _split(spec: Spec) -> Iterator[Problem]:
    split = spec.parallelism
    tp, pp, cp = split.tensor_model_parallel_size, split.pipeline_model_parallel_size, split.context_parallel_size
    vp = split.virtual_pipeline_model_parallel_size
    shared = tp * pp * cp
    if spec.gpus % shared:
        culprit = TP if tp > 1 else PP if pp > 1 else CP
        yield Problem(
            culprit,
            f"TP x PP x CP must divide the GPUs: {tp} x {pp} x {cp} = {shared} does not divide {spec.gpus} (gpus)",
            also=(TP, PP, CP, ("gpus",)),
        )
    else:
        yield from _batch(spec, spec.gpus // shared)
    if vp and vp > 1 and pp == 1:
        yield Problem(VP, f"needs pipeline stages: VP is {vp}, PP is 1", f"set {'.'.join(map(str, PP))}", also=(PP,))
    if split.sequence_parallel and tp == 1:
        yield Problem(("parallelism", "sequence_parallel"), "needs tensor parallelism: TP is 1", also=(TP,))
    if cp > 1 and spec.seq_length % (2 * cp):
        yield Problem(("seq_length",), f"must be a multiple of 2 x CP: {spec.seq_length} is none of {2 * cp}", also=(CP,))
    if cp > 1 and is_packed(spec):
        # NeMo 2.7.3 cuts all that a batch has into CP parts, and so the lengths of what is packed in it
        packed: KeyPath = ("data", "packed")
        yield Problem(CP, f"needs sequences that are not packed: CP is {cp}", "set data.packed = false", also=(packed,))


def global_batch_size(spec: Spec) -> int:
    """Sequences of a step: the spec's, or as many for each GPU as the recipe has."""
    return spec.global_batch_size or RECIPE_SEQUENCES_PER_GPU * spec.gpus


def is_packed(spec: Spec) -> bool:
    """Whether examples are packed into full sequences: as the spec says, or on GPUs."""
    return spec.gpu != "cpu" if spec.data.packed is None else spec.data.packed


def _batch(spec: Spec, data_parallel_size: int) -> Iterator[Problem]:
    step = spec.micro_batch_size * data_parallel_size
    batch = global_batch_size(spec)
    if batch % step:
        below = batch // step * step
        yield Problem(
            GBS if spec.global_batch_size else ("micro_batch_size",),
            f"the global batch size must be a multiple of micro_batch_size x data-parallel size: "
            f"{batch} is not a multiple of {spec.micro_batch_size} x {data_parallel_size} = {step}",
            f"use a global_batch_size of {below} or {below + step}" if below else f"use a multiple of {step}",
            also=(GBS, ("micro_batch_size",), ("gpus",), TP, PP, CP),
        )


def _data(spec: Spec) -> Iterator[Problem]:
    path: KeyPath = ("data", "path")
    if spec.data.kind == "jsonl" and not spec.data.path:
        yield Problem(path, 'is needed by data.kind = "jsonl"', "name the file", also=(("data", "kind"),))
    if spec.data.kind != "jsonl" and spec.data.path:
        yield Problem(path, f'is read for data.kind = "jsonl" only: it is "{spec.data.kind}"', also=(("data", "kind"),))
    if spec.data.packed and spec.micro_batch_size > 1:
        yield Problem(
            ("micro_batch_size",),
            f"must be 1 with packed sequences, found {spec.micro_batch_size}",
            "make seq_length longer instead, or set data.packed = false",
            also=(("data", "packed"),),
        )
    where: KeyPath = ("checkpoint", "path")
    source = spec.checkpoint.source
    if (source == "directory") != bool(spec.checkpoint.path):
        rule = 'checkpoint.path and checkpoint.source = "directory" need each other'
        found = f'source is "{source}"' if source else "source is not set"
        yield Problem(where, f"{rule}: {found}", also=(("checkpoint", "source"),))
    if spec.checkpoint.revision and source not in (None, "hub"):
        yield Problem(("checkpoint", "revision"), f'is of source = "hub" only: it is "{source}"')


def _optimizations(spec: Spec) -> Iterator[Problem]:
    for name in catalogue_optimizations():
        reason = forbids(name, spec) if getattr(spec.optimizations, name) else ""
        if reason:
            also: tuple[KeyPath, ...] = (("scheme",), ("gpu",), ("micro_batch_size",), ("data", "packed"), TP, PP, CP)
            yield Problem(("optimizations", name), reason, f"leave {name} out: it is on where it helps", also=also)


def forbids(name: str, spec: Spec) -> str:
    """What an optimization needs and this run does not have; empty if it can be had."""
    split = spec.parallelism
    tp, pp, cp = split.tensor_model_parallel_size, split.pipeline_model_parallel_size, split.context_parallel_size
    frozen = {'scheme = "lora" (weights that are trained became NaN)': spec.scheme == "lora"}
    needs = {
        "cuda_graphs": {"packed sequences": is_packed(spec), "PP = CP = 1": pp * cp == 1},
        "fused_cross_entropy": {"micro_batch_size = 1 (else its gradients are wrong)": spec.micro_batch_size == 1},
        "loss_tokens_only": {"TP = PP = CP = 1": tp * pp * cp == 1},
        "scale_small_tensor": {
            'scheme = "lora"': spec.scheme == "lora",
            "TP = 1 and no dropout in the adapters": tp == 1 and not spec.lora.dropout,
        },
        "fused_wgrad_accumulation": {'scheme = "sft"': spec.scheme == "sft"},
        "skip_shard_transposes": {'scheme = "sft" and precision = "fp8"': (spec.scheme, spec.precision) == ("sft", "fp8")},
        "short_padding": {"packed sequences": is_packed(spec), "CP = 1": cp == 1},
        "fused_swiglu": {
            **frozen,
            "no adapters on linear_fc1 and linear_fc2": not {"linear_fc1", "linear_fc2"} & set(spec.lora.targets),
            "TP = 1": tp == 1,
        },
        "op_fuser": frozen,
        "merge_micro_batches": {"packed sequences": is_packed(spec), "PP = CP = 1": pp * cp == 1},
    }
    missing = [what for what, there in {"a GPU": spec.gpu != "cpu", **needs.get(name, {})}.items() if not there]
    return f"needs {missing[0]}" if missing else ""


def _rest(spec: Spec, site: Site) -> Iterator[Problem]:
    if spec.window.last_steps > spec.max_steps:
        yield Problem(
            ("window", "last_steps") if "window" in spec.model_fields_set else ("max_steps",),
            f"the timed steps must be run: window.last_steps is {spec.window.last_steps}, max_steps {spec.max_steps}",
            f"set window.last_steps to {spec.max_steps} or fewer",
            also=(("max_steps",), ("window", "last_steps")),
        )
    if spec.scheme == "sft" and "lora" in spec.model_fields_set:
        yield Problem(("lora",), 'is read for scheme = "lora" only: it is "sft"', also=(("scheme",),))
    for prefix, environment in (((), spec.environment), (("site",), site.environment)):
        for name in sorted(SET_BY_THE_SCRIPT & environment.keys()):
            yield Problem((*prefix, "environment", name), "is set by the generated script")
    yield from _python(site)
    yield from _slurm(spec, site)


def _profile(spec: Spec) -> Iterator[Problem]:
    asked = spec.profile
    if not asked:
        return
    where: KeyPath = ("profile", "last_step")
    untimed = spec.max_steps - spec.window.last_steps
    if asked.first_step > asked.last_step:
        yield Problem(where, f"must not come before first_step: {asked.last_step} < {asked.first_step}")
    elif asked.last_step >= untimed:
        rule = f"profiled steps must not be timed ones: the window begins at step {untimed}"
        yield Problem(where, f"{rule}, last_step is {asked.last_step}", also=(("max_steps",), ("window", "last_steps")))
    if unknown := [rank for rank in asked.ranks if rank >= spec.gpus]:
        yield Problem(
            ("profile", "ranks"), f"must be ranks of the run: there is no {unknown[0]} of {spec.gpus}", also=(("gpus",),)
        )
    if asked.tool == "nsys" and spec.gpu == "cpu":
        yield Problem(
            ("profile", "tool"), "nsys records GPUs: this run has none", 'set profile.tool = "pytorch"', also=(("gpu",),)
        )


def _python(site: Site) -> Iterator[Problem]:
    python = site.python
    in_image = python.kind in ("container", "apptainer")
    goes_with = f'goes with python.kind = "container" or "apptainer": it is "{python.kind}"'
    if in_image and not python.image:
        yield Problem(("site", "python", "image"), f'is needed by python.kind = "{python.kind}"')
    if python.kind == "venv" and not python.path:
        yield Problem(("site", "python", "path"), 'is needed by python.kind = "venv"')
    if python.image_from and not (python.image and "/" in python.image):
        yield Problem(("site", "python", "image_from"), "is imported into a file: python.image must be its path")
    for key in ("image", "image_from", "mounts", "writable", "mount_home"):
        if getattr(python, key) and not in_image:
            yield Problem(("site", "python", key), goes_with)


def _slurm(spec: Spec, site: Site) -> Iterator[Problem]:
    """What sbatch would refuse, as far as the profile tells."""
    if site.gpu_type and site.gpu_request == "none":
        yield Problem(("site", "gpu_type"), 'goes with a gpu_request: it is "none"', 'set gpu_request = "gres"')
    known = "gpus_per_node" in site.model_fields_set
    if known and spec.gpus_per_node and spec.gpus_per_node > site.gpus_per_node:
        yield Problem(
            ("gpus_per_node",),
            f"must be there: {spec.gpus_per_node} of a node's {site.gpus_per_node} (site.gpus_per_node)",
            also=(("site", "gpus_per_node"),),
        )
    nodes = max(1, spec.gpus // (spec.gpus_per_node or site.gpus_per_node))
    if site.max_nodes and nodes > site.max_nodes:
        yield Problem(
            ("gpus",),
            f"must fit the partition: {nodes} nodes, and it takes {site.max_nodes} (site.max_nodes)",
            also=(("gpus_per_node",), ("site", "max_nodes")),
        )
    for key in ("walltime", "convert_walltime"):
        if site.max_walltime and parse_walltime(getattr(spec, key)) > parse_walltime(site.max_walltime):
            yield Problem(
                (key,),
                f"must fit the partition: {getattr(spec, key)}, and it takes {site.max_walltime} (site.max_walltime)",
                also=(("site", "max_walltime"),),
            )
    for key in ("sbatch_flags", "srun_flags", "convert_flags"):
        yield from _flags(key, getattr(site, key))


def _flags(key: str, flags: list[str]) -> Iterator[Problem]:
    for number, flag in enumerate(flags):
        where: KeyPath = ("site", key, number)
        option = flag.partition("=")[0]
        if not option.startswith("--") or option == "--":
            yield Problem(where, f"must be a long option, --name or --name=value, found {flag!r}")
        elif key == "sbatch_flags" and option in SAID_ELSEWHERE:
            yield Problem(where, f"{option} is said by {SAID_ELSEWHERE[option]}")
        elif key == "srun_flags" and option in SET_BY_SRUN:
            yield Problem(where, f"{option} is set by the generated script")


def _fits_the_model(spec: Spec, model: Model) -> Iterator[Problem]:
    split = spec.parallelism
    tp, pp = split.tensor_model_parallel_size, split.pipeline_model_parallel_size
    stages = pp * (split.virtual_pipeline_model_parallel_size or 1)
    for what, count in (("attention heads", model.num_attention_heads), ("query groups", model.num_query_groups)):
        if count % tp:
            yield Problem(TP, f"must divide the {what}: {count} is not a multiple of {tp}", also=(("model",),))
    if model.num_layers % stages:
        yield Problem(
            PP,
            f"PP x VP must divide the layers: {model.num_layers} is not a multiple of {stages}",
            also=(("model",), VP),
        )
    if spec.seq_length > model.max_position_embeddings:
        yield Problem(
            ("seq_length",),
            f"must not exceed the model's positions: {spec.seq_length} > {model.max_position_embeddings}",
            also=(("model",),),
        )


def _fits_the_gpu(spec: Spec, gpu: Gpu) -> Iterator[Problem]:
    if spec.precision not in gpu.precisions:
        yield Problem(
            ("precision",),
            f"must be one that the GPU has: {gpu.name} has no {spec.precision}",
            "one of " + ", ".join(gpu.precisions),
            also=(("gpu",),),
        )
    split = spec.parallelism
    shared = split.tensor_model_parallel_size * split.pipeline_model_parallel_size * split.context_parallel_size
    if gpu.name == "cpu" and shared > 1:
        yield Problem(("parallelism",), f"a CPU run is data-parallel only: TP x PP x CP is {shared}", also=(("gpu",),))
    if gpu.name == "cpu" and spec.data.packed:
        yield Problem(("data", "packed"), "packed sequences need a GPU's attention kernels", also=(("gpu",),))
