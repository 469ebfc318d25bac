"""Tells where each number of a plan comes from. In: an `Experiment`. Out: `tuple[str, str, str]`s of key, value, origin."""

from dataclasses import asdict
from typing import Any

from ftgen import catalogue
from ftgen.documents import leaves
from ftgen.errors import KeyPath, dotted
from ftgen.plan import memory
from ftgen.plan.experiments import Experiment
from ftgen.spec.source import Source, place
from ftgen.validation import show

SPLIT = "catalogue, for the model and the GPU's memory; or no split"
# The origin of a number that no key of the spec or of the site profile sets.
_COMPUTED = {
    "experiment": "{scheme}_nemo_{model}_{precision}_{gpus}, as in the recipe",
    "nodes": "gpus / gpus_per_node",
    "gpus_per_node": "the smaller of gpus and the GPUs of a node",
    "global_batch_size": "4 x gpus, as in the recipe",
    **{f"parallelism.{kind}_model_parallel_size": SPLIT for kind in ("tensor", "pipeline", "virtual_pipeline")},
    **dict.fromkeys(("parallelism.context_parallel_size", "parallelism.sequence_parallel"), SPLIT),
    "parallelism.data_parallel_size": "gpus / (TP x PP x CP)",
    "max_steps": "100 by default; with epochs, the job computes it from the data",
    "epochs": "none",
    "data.chat_template": "the tokenizer's own",
    "data.too_long": "error; truncate for squad and synthetic, as in the recipe",
    "data.order": "recipe for squad, synthetic and jsonl, as NeMo trains them; epochs if a key needs real epochs",
    "data.packed": "true on GPUs, false on a CPU",
    "optimizer.learning_rate": "the recipe, for the scheme",
    "model.flops_per_sample": "catalogue, for seq_length tokens: forward and backward, without attention scores",
    "model.parameters": "computed from the architecture",
    "checkpoint.source": "catalogue, for the model",
    "checkpoint.gated": "catalogue, for the model",
    "checkpoint.place": "source and name of the weights; a folder in $NEMO_HOME/models",
    "gpu.peak_flops": "catalogue: dense peak in the precision of the run, FLOP/s",
    "lora": 'none for scheme = "sft"',
    "profile": "none",
    "slurm.end_before_limit_s": "120 s, with [save] also a save at 1 GB/s; at most a quarter of walltime",
    "save": "none",
    "save.checkpoint_bytes": "estimated: bytes of a trained weight with its optimizer state x trained weights",
    "validation": "none",
    "export": "none",
    "log": "none",
    "price": "none",
    "validation.fraction": "5% of the examples, or none if there is a file",
    "node_check.expected": "catalogue, for the GPU",
    "format": "ftgen",
    "ftgen_version": "ftgen",
    "name": "file name of the spec",
    "spec_file": "the spec",
    "spec_sha256": "text of the spec",
    "point": "no matrix",
    "overrides": "--set",
}
# Keys of the plan that have another path in the spec.
_SPEC_KEYS = {
    "window_steps": ("window", "last_steps"),
    "model.name": ("model",),
    "gpu.name": ("gpu",),
    "slurm.walltime_s": ("walltime",),
    "slurm.convert_walltime_s": ("convert_walltime",),
}
# And of the site profile.
_SITE_KEYS: dict[str, KeyPath] = {"price.per_gpu_hour": ("price_per_gpu_hour",), "price.currency": ("currency",)}


def explain(experiment: Experiment) -> list[tuple[str, str, str]]:
    """(key, value, origin) for every number of the plan, in its order, and for the memory."""
    rows = []
    for path, value in leaves(asdict(experiment.plan)).items():
        rows.append((dotted(path), _text(value), _origin(experiment, path)))
    return rows + _memory(experiment)


def _memory(experiment: Experiment) -> list[tuple[str, str, str]]:
    """GiB of one GPU, by part. The plan does not contain them: they are estimated from it."""
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
    if isinstance(value, str):
        return value if "\n" not in value else f"a text of {len(value.splitlines())} lines"
    return show(value)


def _origin(experiment: Experiment, path: KeyPath) -> str:
    key = dotted(path)
    if path[0] in ("overrides", "point") and path[1:]:
        return {"overrides": "--set", "point": "matrix of the spec"}[str(path[0])]
    spec_path = _SPEC_KEYS.get(key, path)
    site_path = _SITE_KEYS.get(key, path[1:] if path[0] == "slurm" else path)
    computed = _COMPUTED.get(key)
    if said := _said(experiment.spec, spec_path) or _said(experiment.site, site_path):
        return f"{said} ({computed})" if computed and spec_path != path else said
    if computed:
        return computed
    if path[0] in ("model", "gpu") and key not in _SPEC_KEYS:
        name = getattr(experiment.plan, str(path[0])).name
        known = catalogue.models() if path[0] == "model" else catalogue.gpus()
        return f"catalogue/{path[0]}s.toml [{name}]" if name in known else "user catalogue"
    if path[:2] == ("node_check", "expected"):
        return _COMPUTED["node_check.expected"]
    if path[0] == "optimizations":
        return f"catalogue/optimizations.toml [{path[1]}]"
    if path[0] == "environment":
        return "the recipe"
    if (
        path[0] in ("slurm", "python", "stage_path", "modules", "setup_lines", "prefix", "node_check", "telemetry")
        and key not in _SPEC_KEYS
    ):
        return "site default"
    return "default"


def _said(source: Source, path: KeyPath) -> str:
    """`file:line` that sets exactly this key; "" if nothing sets it."""
    said = source.said(path)
    return place(said) if said else ""
