"""Checks what an engine has: FP8 scaling, sources, recipes and optimizations.

In: a `Spec`. Out: `list[Problem]`s, and the engine's own defaults. Pure.
"""

from collections.abc import Iterator

from ftgen import catalogue
from ftgen.catalogue import Model
from ftgen.errors import KeyPath, Problem, quoted
from ftgen.plan import data_rules
from ftgen.spec.spec import Spec

TP: KeyPath = ("parallelism", "tensor_model_parallel_size")
PP: KeyPath = ("parallelism", "pipeline_model_parallel_size")
CP: KeyPath = ("parallelism", "context_parallel_size")


def fp8_scaling(spec: Spec) -> str | None:
    """How FP8 values are scaled; None if the run is not in FP8. The defaults are those of the engines' recipes."""
    if spec.precision != "fp8":
        return None
    return spec.fp8_scaling or {"nemo": "delayed", "megatron_bridge": "current"}[spec.engine]


def engine(spec: Spec) -> Iterator[Problem]:
    """The broken rules of the keys that not every engine has."""
    scaling: KeyPath = ("fp8_scaling",)
    if spec.fp8_scaling and spec.precision != "fp8":
        yield Problem(scaling, f'requires precision = "fp8", found "{spec.precision}"', also=(("precision",),))
    if spec.fp8_scaling == "current" and spec.engine == "nemo":
        rule = 'must be "delayed" with engine = "nemo": ftgen has no recipe of NeMo with current scaling'
        yield Problem(scaling, rule, 'set engine = "megatron_bridge"', also=(("engine",),))
    if spec.engine == "megatron_bridge":
        for tree in ("megatron_lm", "nemo"):
            if getattr(spec.sources, tree):
                rule = 'requires engine = "nemo": with Megatron-Bridge, no source trees were tried'
                yield Problem(("sources", tree), rule, "remove it", also=(("engine",),))
        cp = spec.parallelism.context_parallel_size
        if cp > 1 and data_rules.is_packed(spec) and data_rules.order(spec) != "recipe":
            # Each example of a pack must be padded, so that CP ranks can share it. Megatron-Bridge's own packs are.
            rule = f"must be 1 with packs that ftgen makes, as for this data, found {cp}"
            also: tuple[KeyPath, ...] = (("data", "packed"), data_rules.KIND, ("data", "too_long"), ("epochs",))
            yield Problem(CP, rule, "set data.packed = false", also=also)


def recipe(spec: Spec, model: Model) -> Iterator[Problem]:
    """A problem if the engine has no recipe for the model."""
    if spec.engine == "megatron_bridge" and not model.megatron_bridge_recipe:
        rule = f"Megatron-Bridge has no recipe for {model.name} (megatron_bridge_recipe in the catalogue)"
        yield Problem(("engine",), rule, 'set engine = "nemo", or another model', also=(("model",),))


def optimizations(spec: Spec) -> Iterator[Problem]:
    """A problem for each optimization that the spec asks for and the run cannot have."""
    for name in catalogue.optimizations():
        reason = forbids(name, spec) if getattr(spec.optimizations, name) else ""
        if reason:
            also: tuple[KeyPath, ...] = (
                ("engine",),
                ("scheme",),
                ("gpu",),
                ("micro_batch_size",),
                ("data", "packed"),
                ("save",),
                ("log",),
                TP,
                PP,
                CP,
            )
            hint = "remove this key: the preset enables it where it helps"
            yield Problem(("optimizations", name), reason, hint, also=also)


def is_on(name: str, spec: Spec) -> bool:
    """Whether the run has it: as the spec sets it; else if measurements showed a gain and the run meets its requirements."""
    said: bool | None = getattr(spec.optimizations, name)
    if said is not None:
        return said
    helps = catalogue.optimizations()[name].is_default(spec.scheme, spec.precision, spec.gpu, spec.engine)
    return spec.optimizations.preset == "measured" and helps and not forbids(name, spec)


def forbids(name: str, spec: Spec) -> str:
    """What the optimization requires and the run does not have; "" if the run has everything."""
    known = catalogue.optimizations()[name]
    if spec.engine not in known.engines:
        return f"requires engine = {' or '.join(map(quoted, known.engines))}" + (f": {known.lacks}" if known.lacks else "")
    split = spec.parallelism
    tp, pp, cp = split.tensor_model_parallel_size, split.pipeline_model_parallel_size, split.context_parallel_size
    packs = {"packed sequences": data_rules.is_packed(spec), "CP = 1": cp == 1}
    sft = {'scheme = "sft"': spec.scheme == "sft"}
    adapters = {
        'scheme = "lora"': spec.scheme == "lora",
        "TP = 1 and no dropout in the adapters": tp == 1 and not spec.lora.dropout,
    }
    needs = {
        "cuda_graphs": {
            "packed sequences": data_rules.is_packed(spec),
            "PP = CP = 1": pp * cp == 1,
            # The first step after a resume runs without graphs, the same step of a run without a break with them. With LoRA,
            # both give the same bits: bench/results/2026-11-27-h200-resume.json
            'scheme = "lora" with [save] (no SFT was shown to resume exactly)': spec.save is None or spec.scheme == "lora",
        },
        "fused_cross_entropy": {"micro_batch_size = 1 (otherwise its gradients are wrong)": spec.micro_batch_size == 1},
        "loss_tokens_only": {"TP = PP = CP = 1": tp * pp * cp == 1},
        "scale_small_tensor": adapters,
        "fused_wgrad_accumulation": sft,
        "async_step": {"no [log] (a tracker reads the values of a step at its end)": spec.log is None},
        "skip_shard_transposes": {'scheme = "sft" and precision = "fp8"': (spec.scheme, spec.precision) == ("sft", "fp8")},
        "short_padding": packs,
        "fused_rotary": packs,
        "short_attention": packs,
        "fused_lora_add": adapters,
        "fused_swiglu": {
            "no adapters on linear_fc1 and linear_fc2": spec.scheme == "sft"
            or not {"linear_fc1", "linear_fc2"} & set(spec.lora.targets),
            "TP = 1": tp == 1,
        },
        "fp8_swiglu": {'precision = "fp8"': spec.precision == "fp8"},
        "early_gather": sft,
        "bf16_grads_in_adam": sft,
        "op_fuser": {'scheme = "lora" (SFT has no adapters to fuse; use fused_swiglu)': spec.scheme == "lora"},
        "merge_micro_batches": {"packed sequences": data_rules.is_packed(spec), "PP = CP = 1": pp * cp == 1},
    }
    base = {f"optimizations.{known.builds_on}": is_on(known.builds_on, spec)} if known.builds_on else {}
    missing = [what for what, there in {"a GPU": spec.gpu != "cpu", **needs.get(name, {}), **base}.items() if not there]
    return f"requires {missing[0]}" if missing else ""
