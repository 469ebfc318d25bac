"""Where each number of a plan comes from. In: an `Experiment`. Out: rows of key, value, origin, for `ftgen plan`."""

from dataclasses import asdict
from typing import Any

from ftgen import catalogue
from ftgen.documents import leaves
from ftgen.errors import KeyPath, dotted
from ftgen.plan import memory
from ftgen.plan.experiments import Experiment
from ftgen.spec.source import Source, place
from ftgen.validation import show

# The plan's numbers that are worked out, and from what, where no key of the spec or the site says them.
SPLIT = "the catalogue's for the model and the GPU's memory, or none"
_WORKED_OUT = {
    "experiment": "{scheme}_nemo_{model}_{precision}_{gpus}, the recipe's name",
    "nodes": "gpus / gpus_per_node",
    "gpus_per_node": "the smaller of gpus and a node's GPUs",
    "global_batch_size": "4 x gpus, as the recipe",
    **{f"parallelism.{kind}_model_parallel_size": SPLIT for kind in ("tensor", "pipeline", "virtual_pipeline")},
    **dict.fromkeys(("parallelism.context_parallel_size", "parallelism.sequence_parallel"), SPLIT),
    "parallelism.data_parallel_size": "gpus / (TP x PP x CP)",
    "data.packed": "true on GPUs, false on a CPU",
    "optimizer.learning_rate": "the recipe's for the scheme",
    "model.flops_per_sample": "catalogue, for seq_length tokens: forward and backward, without attention scores",
    "model.parameters": "worked out from the architecture",
    "checkpoint.source": "catalogue: the model's",
    "checkpoint.gated": "catalogue: the model's",
    "checkpoint.place": "the weights' source and name; below $NEMO_HOME/models",
    "gpu.peak_flops": "catalogue: dense peak in the run's precision, FLOP/s",
    "lora": 'none: scheme = "sft"',
    "profile": "none",
    "format": "ftgen",
    "ftgen_version": "ftgen",
    "name": "the spec's file name",
    "spec_file": "the spec",
    "spec_sha256": "the spec's text",
    "point": "no matrix",
    "overrides": "--set",
}
# The plan's keys whose name or table in the spec or the site is another.
_SPEC_KEYS = {
    "window_steps": ("window", "last_steps"),
    "model.name": ("model",),
    "gpu.name": ("gpu",),
    "slurm.walltime_s": ("walltime",),
    "slurm.convert_walltime_s": ("convert_walltime",),
}


def explain(experiment: Experiment) -> list[tuple[str, str, str]]:
    """(key, value, origin) for every number of the plan, in the plan's order."""
    rows = []
    for path, value in leaves(asdict(experiment.plan)).items():
        rows.append((dotted(path), _text(value), _origin(experiment, path)))
    return rows + _memory(experiment)


def _memory(experiment: Experiment) -> list[tuple[str, str, str]]:
    """GiB of one GPU by part, which the plan does not hold: estimated from it."""
    needed = memory.estimate(experiment.plan)
    if needed is None:
        return []
    parts = {**asdict(needed), "total": needed.total}
    return [(f"memory_gib.{part}", f"{gib:.1f}", "estimated for the peak of one GPU") for part, gib in parts.items()]


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else show(value)


def _origin(experiment: Experiment, path: KeyPath) -> str:
    key = dotted(path)
    if path[0] in ("overrides", "point") and path[1:]:
        return {"overrides": "--set", "point": "the spec's matrix"}[str(path[0])]
    spec_path = _SPEC_KEYS.get(key, path)
    site_path = path[1:] if path[0] == "slurm" else path
    worked_out = _WORKED_OUT.get(key)
    if said := _said(experiment.spec, spec_path) or _said(experiment.site, site_path):
        return f"{said} ({worked_out})" if worked_out and spec_path != path else said
    if worked_out:
        return worked_out
    if path[0] in ("model", "gpu") and key not in _SPEC_KEYS:
        name = getattr(experiment.plan, str(path[0])).name
        known = catalogue.models() if path[0] == "model" else catalogue.gpus()
        return f"catalogue/{path[0]}s.toml [{name}]" if name in known else "the catalogue that is named"
    if path[0] == "optimizations":
        return f"catalogue/optimizations.toml [{path[1]}]"
    if path[0] == "environment":
        return "the recipe's"
    if path[0] in ("slurm", "python", "stage_path", "modules") and key not in _SPEC_KEYS:
        return "site default"
    return "default"


def _said(source: Source, path: KeyPath) -> str:
    """Where the source says this key itself."""
    said = source.said(path)
    return place(said) if said else ""
