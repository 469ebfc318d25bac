"""Checks the rules that the keys of a spec and a site profile must satisfy together.

In: a `Spec`, a `Site`, and a `Model` and a `Gpu` of the catalogue. Out: `list[Problem]` with every broken rule. Pure.
"""

import re
from collections.abc import Iterator

from ftgen.catalogue import Gpu, Model, gpus, models
from ftgen.errors import KeyPath, Problem, closest, quoted
from ftgen.plan import data_rules, engine_rules
from ftgen.plan.data_rules import is_packed
from ftgen.plan.engine_rules import CP, PP, TP
from ftgen.plan.flags import flag_problems
from ftgen.plan.site_rules import site_problems
from ftgen.spec.site import Site
from ftgen.spec.spec import Spec
from ftgen.units import parse_walltime

# Variables that the generated script sets in every task. A spec or a site profile must not set them. The hints name the key
# that does what the user may want.
SET_BY_THE_SCRIPT = {
    **dict.fromkeys(
        (
            "NEMO_HOME",
            "HF_HOME",
            "HF_TOKEN_PATH",
            "NEMORUN_HOME",
            "FTGEN_RUN_DIR",
            "FTGEN_ENVIRONMENT",
            "FTGEN_SCRIPT_SHA256",
        ),
        "",
    ),
    "FTGEN_HUB_CACHE": "export HF_HUB_CACHE, or set it here",
    **dict.fromkeys(("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), ""),
    "STAGE_PATH": "set stage_path in the site profile",
    "MASTER_ADDR": "set master_addr in the site profile: an address, interface:NAME, or a command that prints the address",
    "MASTER_PORT": "leave it out: the script takes a free port",
}
RECIPE_SEQUENCES_PER_GPU = 4  # per step: GBS = 4 x GPUs
HELD_OUT = 0.05  # fraction of the examples that is held out by default, as in NeMo's SquadDataModule
VP: KeyPath = ("parallelism", "virtual_pipeline_model_parallel_size")
GBS: KeyPath = ("global_batch_size",)


def broken_rules(spec: Spec, site: Site, model: Model | None, gpu: Gpu | None) -> list[Problem]:
    """Every broken rule. `model` or `gpu` is None if the catalogue does not have it."""
    nodes = max(1, spec.gpus // gpus_of_a_node(spec, site, gpu))
    problems = [
        *_whole_nodes(spec, gpus_of_a_node(spec, site, gpu)),
        *_split(spec),
        *_data(spec),
        *engine_rules.engine(spec),
        *engine_rules.optimizations(spec),
        *_profile(spec),
        *_save(spec),
        *_validation(spec),
        *_export(spec),
        *_rest(spec, site),
        *_slurm(spec, site, nodes),
        *site_problems(site, nodes, spec.engine),
        *flag_problems(site),
    ]
    if model is None:
        problems.append(Problem(("model",), f"must be in the catalogue, found {spec.model}", closest(spec.model, models())))
    else:
        problems += _fits_the_model(spec, model)
        problems += engine_rules.recipe(spec, model)
    if gpu is None:
        problems.append(Problem(("gpu",), f"must be in the catalogue, found {spec.gpu}", closest(spec.gpu, gpus())))
    else:
        problems += _fits_the_gpu(spec, gpu)
    return problems


def gpus_of_a_node(spec: Spec, site: Site, gpu: Gpu | None) -> int:
    """GPUs of each node: as the spec says it, or the site profile, or the catalogue for the GPU."""
    usual = gpu.gpus_per_node if gpu else Gpu._field_defaults["gpus_per_node"]
    return spec.gpus_per_node or site.gpus_per_node or usual


def _whole_nodes(spec: Spec, node: int) -> Iterator[Problem]:
    key: KeyPath = ("gpus_per_node",) if spec.gpus_per_node else ("site", "gpus_per_node")
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
        yield Problem(VP, f"VP > 1 requires PP > 1: VP is {vp}, PP is 1", f"set {'.'.join(map(str, PP))}", also=(PP,))
    if split.sequence_parallel and tp == 1:
        yield Problem(("parallelism", "sequence_parallel"), "requires TP > 1: TP is 1", also=(TP,))
    if cp > 1 and spec.seq_length % (2 * cp):
        yield Problem(("seq_length",), f"must be a multiple of 2 x CP = {2 * cp}, found {spec.seq_length}", also=(CP,))
    if cp > 1 and is_packed(spec) and spec.engine == "nemo":
        # NeMo 2.7.3 splits every tensor of a batch into CP parts, also the one with the lengths of the packed sequences
        packed: KeyPath = ("data", "packed")
        rule, hint = f"must be 1 with packed sequences, found {cp}", "set data.packed = false"
        yield Problem(CP, rule, hint, also=(packed, ("engine",)))


def global_batch_size(spec: Spec) -> int:
    """Sequences per step. The default is that of the recipe: 4 x GPUs."""
    return spec.global_batch_size or RECIPE_SEQUENCES_PER_GPU * spec.gpus


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
    yield from data_rules.problems(spec)
    if spec.data.packed and spec.micro_batch_size > 1:
        yield Problem(
            ("micro_batch_size",),
            f"must be 1 with packed sequences, found {spec.micro_batch_size}",
            "increase seq_length instead, or set data.packed = false",
            also=(("data", "packed"),),
        )
    where: KeyPath = ("checkpoint", "path")
    source = spec.checkpoint.source
    if (source == "directory") != bool(spec.checkpoint.path):
        rule = 'must be set if, and only if, checkpoint.source is "directory"'
        found = f"path {'is' if spec.checkpoint.path else 'is not'} set, source is {quoted(source) if source else 'not set'}"
        yield Problem(where, f"{rule}: {found}", also=(("checkpoint", "source"),))
    if spec.checkpoint.revision and source not in (None, "hub"):
        yield Problem(("checkpoint", "revision"), f'requires checkpoint.source = "hub", found "{source}"')


def _save(spec: Spec) -> Iterator[Problem]:
    if spec.save and spec.precision == "fp8":
        # A resumed run must train the same bits as a run without a break. In FP8 that depends on the scales and the amax
        # history of every layer, which a checkpoint of NeMo does not have: losses after a resume differ by up to 0.05
        # (bench/results/2026-11-27-h200-resume.json).
        rule = 'requires precision "bf16" or "fp32", found "fp8": a resumed FP8 run does not train the same bits'
        yield Problem(("save",), rule, 'set precision = "bf16", or remove [save]', also=(("precision",),))


def _validation(spec: Spec) -> Iterator[Problem]:
    asked = spec.validation
    if not asked:
        return
    if asked.file and asked.fraction:
        rule = "must not be set together with validation.file"
        yield Problem(("validation", "fraction"), rule, "remove one of them", also=(("validation", "file"),))
    elif spec.data.kind == "synthetic" and not asked.file:
        # packing makes fewer sequences than examples: the job counts those
        fraction, batch = asked.fraction or HELD_OUT, global_batch_size(spec)
        held_out = max(1, round(spec.data.examples * fraction))
        if held_out < batch:
            yield Problem(
                ("validation", "fraction") if asked.fraction else ("validation",),
                f"the held-out examples must fill a global batch: {fraction:g} of {spec.data.examples} examples "
                f"(data.examples) are {held_out}, the global batch size is {batch}",
                "increase validation.fraction or data.examples, or reduce global_batch_size",
                also=(("data", "examples"), GBS, ("gpus",)),
            )


def _export(spec: Spec) -> Iterator[Problem]:
    where: KeyPath = ("export", "what")
    if not spec.export:
        return
    if not spec.save:
        rule = "requires a training that is saved: [save] is not set"
        yield Problem(("export",), rule, "add a line [save] to the spec", also=(("save",),))
    if "adapter" in spec.export.what and spec.scheme == "sft":
        yield Problem(where, '"adapter" requires scheme = "lora", found "sft"', 'use "merged"', also=(("scheme",),))
    if len(set(spec.export.what)) < len(spec.export.what):
        yield Problem(where, f"must have each value once, found {', '.join(spec.export.what)}")


def _rest(spec: Spec, site: Site) -> Iterator[Problem]:
    steps = data_rules.max_steps(spec)
    if steps and spec.window.last_steps > steps:
        yield Problem(
            ("window", "last_steps") if "window" in spec.model_fields_set else ("max_steps",),
            f"window.last_steps must not exceed max_steps: {spec.window.last_steps} > {steps}",
            f"set window.last_steps to at most {steps}",
            also=(("max_steps",), ("window", "last_steps")),
        )
    if spec.scheme == "sft" and "lora" in spec.model_fields_set:
        yield Problem(("lora",), 'requires scheme = "lora", found "sft"', also=(("scheme",),))
    for prefix, environment in (((), spec.environment), (("site",), site.environment)):
        for name in sorted(SET_BY_THE_SCRIPT.keys() & environment.keys()):
            where: KeyPath = (*prefix, "environment", name)
            yield Problem(where, "must not be set: the generated script sets it", SET_BY_THE_SCRIPT[name])
        path = environment.get("PATH")
        if path is not None and not re.search(r"\$(PATH\b|\{PATH\})", path):
            hint = "write /opt/x/bin:$PATH"
            yield Problem((*prefix, "environment", "PATH"), f"must contain $PATH, found {quoted(path)}", hint)


def _profile(spec: Spec) -> Iterator[Problem]:
    asked = spec.profile
    if not asked:
        return
    where: KeyPath = ("profile", "last_step")
    steps = data_rules.max_steps(spec)
    untimed = (steps or 0) - spec.window.last_steps
    if steps is None:
        rule = "requires max_steps: with epochs, the timed steps are not known before the job"
        yield Problem(("profile",), rule, also=(("epochs",),))
    elif asked.first_step > asked.last_step:
        yield Problem(where, f"must not be less than first_step: {asked.last_step} < {asked.first_step}")
    elif asked.last_step >= untimed:
        rule = f"profiled steps must not be timed steps: the timed steps begin at step {untimed}"
        yield Problem(where, f"{rule}, last_step is {asked.last_step}", also=(("max_steps",), ("window", "last_steps")))
    if unknown := [rank for rank in asked.ranks if rank >= spec.gpus]:
        rule = f"must be less than {spec.gpus} (gpus), found {unknown[0]}"
        yield Problem(("profile", "ranks"), rule, also=(("gpus",),))
    if asked.tool == "nsys" and spec.gpu == "cpu":
        yield Problem(("profile", "tool"), '"nsys" requires GPUs', 'set profile.tool = "pytorch"', also=(("gpu",),))


def _slurm(spec: Spec, site: Site, nodes: int) -> Iterator[Problem]:
    """Requests that Slurm would refuse, by the limits of the site profile."""
    if site.gpu_type and site.gpu_request == "none":
        yield Problem(("site", "gpu_type"), 'requires a gpu_request, found "none"', 'set gpu_request = "gres"')
    if site.gpus_per_node and spec.gpus_per_node and spec.gpus_per_node > site.gpus_per_node:
        yield Problem(
            ("gpus_per_node",),
            f"must not exceed the GPUs of a node: {spec.gpus_per_node} > {site.gpus_per_node} (site.gpus_per_node)",
            also=(("site", "gpus_per_node"),),
        )
    if site.max_nodes and nodes > site.max_nodes:
        yield Problem(
            ("gpus",),
            f"must fit the partition: {nodes} nodes > {site.max_nodes} (site.max_nodes)",
            also=(("gpus_per_node",), ("site", "max_nodes")),
        )
    for key in ("walltime", "convert_walltime"):
        if site.max_walltime and parse_walltime(getattr(spec, key)) > parse_walltime(site.max_walltime):
            yield Problem(
                (key,),
                f"must fit the partition: {getattr(spec, key)} > {site.max_walltime} (site.max_walltime)",
                also=(("site", "max_walltime"),),
            )


def _fits_the_model(spec: Spec, model: Model) -> Iterator[Problem]:
    split = spec.parallelism
    tp, pp = split.tensor_model_parallel_size, split.pipeline_model_parallel_size
    stages = pp * (split.virtual_pipeline_model_parallel_size or 1)
    for what, count in (("attention heads", model.num_attention_heads), ("query groups", model.num_query_groups)):
        if count % tp:
            yield Problem(TP, f"must divide the {what}: {count} is not a multiple of {tp}", also=(("model",),))
    if model.num_layers % stages:
        rule = f"PP x VP must divide the layers: {model.num_layers} is not a multiple of {stages}"
        yield Problem(PP, rule, also=(("model",), VP))
    if spec.seq_length > model.max_position_embeddings:
        rule = f"must not exceed max_position_embeddings of the model: {spec.seq_length} > {model.max_position_embeddings}"
        yield Problem(("seq_length",), rule, also=(("model",),))


def _fits_the_gpu(spec: Spec, gpu: Gpu) -> Iterator[Problem]:
    if spec.precision not in gpu.precisions:
        rule, hint = f"must be a precision of {gpu.name}, found {spec.precision}", f"use {' or '.join(gpu.precisions)}"
        yield Problem(("precision",), rule, hint, also=(("gpu",),))
    split = spec.parallelism
    shared = split.tensor_model_parallel_size * split.pipeline_model_parallel_size * split.context_parallel_size
    if gpu.name == "cpu" and shared > 1:
        yield Problem(("parallelism",), f"TP x PP x CP must be 1 on a CPU, found {shared}", also=(("gpu",),))
    if gpu.name == "cpu" and spec.data.packed:
        yield Problem(("data", "packed"), "must be false on a CPU: its attention requires a GPU", also=(("gpu",),))
