"""Shows a plan on one screen: the work, the GPUs, their memory, and the keys that differ from their defaults.

In: an `Experiment`. Out: a text (`str`) of at most 40 lines of 100 columns.
"""

import textwrap
from collections.abc import Iterator
from dataclasses import asdict

from ftgen.documents import get, leaves
from ftgen.errors import dotted
from ftgen.plan import checkpoints, memory
from ftgen.plan.experiments import Experiment
from ftgen.plan.forecast import Forecast, describe
from ftgen.plan.plan import Plan
from ftgen.spec.site import Site
from ftgen.spec.source import place
from ftgen.spec.spec import Spec
from ftgen.units import clean, format_walltime
from ftgen.validation import show

LINES, COLUMNS = 40, 100
LABEL = 18  # columns of a row's label, with its indent
Rows = list[tuple[str, str]]


def overview(experiment: Experiment, forecast: Forecast | str) -> str:
    """The overview as text. `ftgen plan --all` shows every number."""
    plan = experiment.plan
    sections = {
        f"{plan.name}: {plan.experiment}": _work(plan),
        "GPUs": _gpus(plan),
        "Memory of one GPU, estimated at the peak": _memory(plan),
        **({"Checkpoints, estimated": checkpoints.describe(plan)} if plan.save else {}),
        "Forecast of the steps, without start, validation and saves": describe(plan, forecast),
        "Enabled optimizations": [("", ", ".join(name for name, on in plan.optimizations.items() if on) or "none")],
        "Slurm request": _slurm(plan),
    }
    lines = [line for title, rows in sections.items() for line in _section(title, rows)]
    room = LINES - len(lines) - 1
    differences = [line for row in _differences(experiment) for line in _lines(*row)]
    if len(differences) > room:
        left = len(differences) - max(room - 1, 0)
        differences = [*differences[: max(room - 1, 0)], f"  {left} more lines: see ftgen plan --all"]
    return "\n".join([*lines, "Keys that differ from their defaults", *differences])


def _section(title: str, rows: Rows) -> list[str]:
    return [_cut(clean(title)), *(line for label, text in rows for line in _lines(label, text))]


def _lines(label: str, text: str) -> list[str]:
    """A row with its label, on at most three lines."""
    label = f"  {clean(label)}"
    indent = " " * LABEL if label.strip() else "  "
    first = f"{label:{LABEL - 1}} " if label.strip() else indent
    wrapped = textwrap.wrap(clean(text), COLUMNS, initial_indent=first, subsequent_indent=indent, max_lines=3)
    return [_cut(line) for line in wrapped or [first.rstrip()]]


def _cut(line: str) -> str:
    return line if len(line) <= COLUMNS else line[: COLUMNS - 3] + "..."


def _work(plan: Plan) -> Rows:
    lora = plan.lora
    scheme = f"LoRA, rank {lora.rank}, alpha {lora.alpha}, on {', '.join(lora.targets)}" if lora else "SFT"
    packed = "packed" if plan.data.packed else "not packed"
    micro_batches = plan.global_batch_size // (plan.micro_batch_size * plan.parallelism.data_parallel_size)
    parts = f"micro-batch size {plan.micro_batch_size} x {micro_batches} micro-batches"
    batch = f"{parts} x DP {plan.parallelism.data_parallel_size}"
    billions = plan.model.parameters / 1e9
    examples = f"{plan.data.examples} examples" * (plan.data.kind == "synthetic")
    data = plan.data.path or plan.data.dataset or examples
    steps = f"{plan.max_steps}" if plan.max_steps else f"{plan.epochs} epochs"
    rate = f"{plan.optimizer.learning_rate:g} after {plan.optimizer.warmup_steps} warmup steps"
    return [
        ("scheme", scheme),
        ("model", f"{plan.model.name}, {billions:.3g} billion parameters, weights: {plan.checkpoint.place}"),
        ("precision", plan.precision),
        ("sequence length", f"{plan.seq_length} tokens, {packed}"),
        ("batch", f"{plan.global_batch_size} sequences per step: {batch}"),
        ("steps", f"{steps}; the last {plan.window_steps} steps are timed"),
        ("data", f"{plan.data.kind}: {data}" if data else plan.data.kind),
        *_validation(plan),
        ("learning rate", rate),
        *([("export", f"{' and '.join(plan.export.what)}, in Hugging Face format")] if plan.export else []),
        *_trackers(plan),
    ]


def _trackers(plan: Plan) -> Rows:
    log = plan.log
    if not log:
        return []
    named = {
        "TensorBoard": log.tensorboard,
        f"Weights & Biases, project {(log.wandb or {}).get('project')}": log.wandb,
        f"MLflow, experiment {(log.mlflow or {}).get('experiment')}": log.mlflow,
    }
    return [("trackers", "; ".join(name for name, asked in named.items() if asked) or "none")]


def _validation(plan: Plan) -> Rows:
    asked = plan.validation
    if not asked:
        return []
    what = asked.file or f"{asked.fraction:.3g} of the data"
    return [("validation", f"{what}, every {asked.every_steps} steps and at the end")]


def _gpus(plan: Plan) -> Rows:
    split = plan.parallelism
    stages = split.virtual_pipeline_model_parallel_size
    virtual = f", virtual PP {stages}" if stages else ""
    sizes = f"TP {split.tensor_model_parallel_size}, PP {split.pipeline_model_parallel_size}{virtual}"
    sequence = ", sequence parallel" if split.sequence_parallel else ""
    nodes = f"{plan.nodes} node{'s' * (plan.nodes > 1)} x {plan.gpus_per_node}"
    if plan.gpu.name == "cpu":
        return [("processes", f"{plan.gpus} on the CPU, {nodes}"), ("split", f"DP {split.data_parallel_size}")]
    return [
        ("GPUs", f"{plan.gpus} {plan.gpu.name}: {nodes}"),
        ("split", f"{sizes}, CP {split.context_parallel_size}, DP {split.data_parallel_size}{sequence}"),
    ]


def _memory(plan: Plan) -> Rows:
    needed = memory.estimate(plan)
    if needed is None:
        return [("", "none: the run has no GPU")]
    parts = ", ".join(f"{part} {gib:.1f}" for part, gib in asdict(needed).items() if gib >= 0.05)
    share = needed.total / plan.gpu.memory_gib
    return [("parts", f"{parts} GiB"), ("total", f"{needed.total:.1f} of {plan.gpu.memory_gib:g} GiB ({share:.0%})")]


def _slurm(plan: Plan) -> Rows:
    slurm, python = plan.slurm, plan.python
    named = ("partition", "account", "qos", "reservation", "constraint")
    said = [f"{key} {getattr(slurm, key)}" for key in named if getattr(slurm, key)]
    request = "no GPU option" if slurm.gpu_request == "none" else f"GPUs with --{slurm.gpu_request}"
    exclusive = ["exclusive"] if slurm.exclusive else []
    cpus = [f"{slurm.cpus_per_gpu} CPUs per GPU"] if slurm.cpus_per_gpu else []
    where = python.image or python.path
    return [
        (
            "nodes",
            f"{plan.nodes} x {plan.gpus_per_node} tasks, {', '.join([*exclusive, *cpus, request, _memory_request(plan)])}",
        ),
        ("time limit", f"{format_walltime(slurm.walltime_s)}; conversion {format_walltime(slurm.convert_walltime_s)}"),
        ("options", ", ".join(said) or "partition and account of the submitting shell"),
        ("Python", f"{python.kind}: {where}" if where else "python3 of the submitting shell"),
    ]


def _memory_request(plan: Plan) -> str:
    slurm = plan.slurm
    if slurm.mem_per_cpu or slurm.mem_per_gpu:
        return f"memory {slurm.mem_per_cpu} per CPU" if slurm.mem_per_cpu else f"memory {slurm.mem_per_gpu} per GPU"
    return {None: "Slurm's default memory", "0": "all memory of a node"}.get(slurm.mem, f"memory {slurm.mem}")


def _differences(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Each key of the spec and the site profile that differs from its default, with its value, file and line."""
    needed = {"scheme": "lora", "precision": "bf16", "gpus": 8}
    spec_defaults = Spec.model_validate(needed).model_dump(exclude=set(needed))
    for source, defaults in ((experiment.spec, spec_defaults), (experiment.site, Site().model_dump())):
        for path, value in leaves(source.document).items():
            said = source.said(path)
            if said and path[0] not in ("matrix", "extends") and get(defaults, path) != value:
                yield dotted(path), f"{value if isinstance(value, str) else show(value)}  ({place(said)})"
