"""What a log is the log of. In: plan.json, a log's head line, or the name of the experiment. Out: an `Identity`.

A plan is read for the keys the tables need and no others: a plan of a later ftgen, with more in it, reads as well.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from ftgen import catalogue
from ftgen.documents import get
from ftgen.errors import LogError, Problem

# What the recipe leaves unsaid in its logs, because it never varies there.
RECIPE_GPU = "h100"
RECIPE_SEQ_LENGTH = 4096

RECIPE_NAME = re.compile(
    r"(?P<scheme>lora|sft)_(?P<engine>nemo|megatron_bridge)_(?P<model>\w+)_(?P<precision>bf16|fp8|fp32)_(?P<gpus>[1-9]\d{0,8})"
)
FIRST_ENGINE = "nemo"  # of plans of an ftgen that had no other
# The names of the recipes since 25.05 and of Megatron-Bridge: pretrain_llama3.1_405b_bf16_gpus128_tp4_pp8_mbs1_gbs128
LONG_NAME = re.compile(
    r"(?P<scheme>pretrain|sft|lora|peft|finetune)_(?P<model>[A-Za-z][A-Za-z0-9.+-]*(?:_[A-Za-z0-9.+-]+)*?)_"
    r"(?P<precision>[a-z0-9]+)(?:_(?:cs|ds|sc|mx))?_(?:gpus(?P<gpus>[1-9]\d{0,6})|\d{1,5}nodes)"
    r"(?P<rest>(?:_[A-Za-z0-9]+)*)"
)
BATCH = re.compile(r"_gbs(\d{1,7})(?![0-9])|_(\d{1,7})gbs(?![0-9A-Za-z])")
GPU = re.compile(r"_((?:gb|gh|a|b|h|l)\d{2,3})(?![0-9A-Za-z])")
# What logs are called whatever they are the log of.
COMMON_NAMES = {"stdout", "stderr", "log", "logs", "output", "out", "slurm", "train", "compose", "console", "nemo_log", ""}
PRECISIONS = {"bf16", "fp16", "fp32", "fp8", "nvfp4"}
SCHEMES = {"peft": "lora", "finetune": "sft"}

MOST = 1e30  # beyond it a number is no measurement of anything, and arithmetic on it overflows


class Identity(NamedTuple):
    """What ran, in the plan's words; None is not known."""

    experiment: str
    model: str | None = None
    scheme: str | None = None
    precision: str | None = None
    gpu: str | None = None
    gpus: int | None = None
    global_batch_size: int | None = None
    seq_length: int | None = None  # tokens
    max_steps: int | None = None
    window_steps: int | None = None
    flops_per_sample: float | None = None
    peak_flops: float | None = None  # FLOP/s of one GPU, dense
    engine: str | None = None  # nemo, megatron_bridge
    assumed: tuple[str, ...] = ()  # which of these come from the experiment's name, or are the recipe's


# Identity's field: key of the plan, and its type.
PLAN_KEYS: dict[str, tuple[tuple[str, ...], type]] = {
    "model": (("model", "name"), str),
    "gpu": (("gpu", "name"), str),
    **{key: ((key,), str) for key in ("experiment", "scheme", "precision", "engine")},
    **{key: ((key,), int) for key in ("gpus", "global_batch_size", "seq_length", "max_steps", "window_steps")},
    "flops_per_sample": (("model", "flops_per_sample"), float),
    "peak_flops": (("gpu", "peak_flops"), float),
}
OPTIONAL = {"max_steps", "window_steps", "flops_per_sample", "peak_flops", "engine"}  # a plan with epochs has no max_steps
RULES = {str: "must be a text", int: "must be a whole number from 1", float: "must be a number above 0"}
# What a framework prints of its settings before the steps: Identity's key, a word, and the pattern of the value behind it.
SETTINGS = (
    ("seq_length", b"seq_length", re.compile(rb"\bseq_length\b[ .:='\"]{1,80}(\d{2,8})\b")),
    ("gpus", b"world_size", re.compile(rb"\bworld_size\b[ .:='\"]{1,80}(\d{1,7})\b")),
    ("gpu", b"NVIDIA ", re.compile(rb"\bNVIDIA (?:[A-Za-z]{1,20} )?((?:GB|GH|A|B|H|L|V)\d{2,3})\b")),
)


def from_plan(text: str | bytes, file: str) -> tuple[Identity, dict[str, Any]]:
    """The identity in a plan's JSON, and all of it; LogError with everything that is wrong in it."""
    try:
        plan = json.loads(text)
    except json.JSONDecodeError as error:
        raise LogError(Problem((), f"the plan is no JSON: {error.msg}", file=file, line=error.lineno)) from None
    except (ValueError, RecursionError) as error:  # no UTF-8, a number of thousands of digits, nested without end
        raise LogError(Problem((), f"the plan is no JSON: {error}", file=file)) from None
    if not isinstance(plan, dict):
        raise LogError(Problem((), "the plan must be a JSON object", file=file))
    values = {field: get(plan, path) for field, (path, _) in PLAN_KEYS.items()}
    problems = [
        Problem(PLAN_KEYS[field][0], f"{RULES[kind]}, found {_short(value)}", file=file)
        for field, value in values.items()
        if not (_fits(value, kind := PLAN_KEYS[field][1]) or (field in OPTIONAL and value is None))
    ]
    if problems:
        raise LogError(*problems)
    return Identity(**values | {"engine": values["engine"] or FIRST_ENGINE}), plan


@lru_cache
def from_name(experiment: str, global_batch_size: int | None = None) -> Identity:
    """What the name of an experiment suggests; what the recipe's own names leave out is the recipe's."""
    named: dict[str, Any]
    if match := RECIPE_NAME.fullmatch(experiment):
        named = {"gpu": RECIPE_GPU, "gpus": int(match["gpus"]), "seq_length": RECIPE_SEQ_LENGTH, "engine": match["engine"]}
    elif match := LONG_NAME.fullmatch(experiment):
        batch, gpu = BATCH.search(match["rest"]), GPU.search(match["rest"])
        named = {"gpu": gpu[1] if gpu else None, "gpus": int(match["gpus"]) if match["gpus"] else None}
        named["global_batch_size"] = int(batch[1] or batch[2]) if batch and global_batch_size is None else None
    else:
        return Identity(experiment, global_batch_size=global_batch_size)
    named = {key: value for key, value in named.items() if value is not None}
    precision = match["precision"] if match["precision"] in PRECISIONS else None
    what = Identity(
        experiment,
        model=_model_name(match["model"]) if precision else None,  # else nobody knows where the model's name ends
        scheme=SCHEMES.get(match["scheme"], match["scheme"]),
        precision=precision,
        assumed=tuple(sorted(named.keys() - {"engine"})),
        **({"global_batch_size": global_batch_size} | named),
    )
    return _with_peaks(what)


def from_log(experiment: str, global_batch_size: int | None, said: Mapping[str, str]) -> Identity:
    """What the name suggests and what the log says of GPU, GPUs and sequence length: the log wins."""
    what = from_name(experiment, global_batch_size)
    if not said:
        return what
    known = {key: value if key == "gpu" else int(value) for key, value in said.items()}
    assumed = tuple(key for key in what.assumed if key not in known)
    return _with_peaks(what._replace(**known, assumed=assumed))  # type: ignore[arg-type]


def settings_in(text: bytes) -> dict[str, str]:
    """The sequence length, the number of GPUs and the kind of GPU, as far as a framework's text has them."""
    found = ((key, pattern.search(text)) for key, word, pattern in SETTINGS if word in text)
    return {key: match[1].decode().lower() for key, match in found if match}


def document(text: bytes) -> dict[str, Any] | None:
    """What the JSON object in the text says; None for any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_name(experiment: str) -> bool:
    """Whether this tells one experiment from others: not `slurm`, or `a/stdout`."""
    return experiment.rpartition("/")[2].lower() not in COMMON_NAMES


def _model_name(name: str) -> str:
    """The catalogue's name for the model, if it has one: llama3.1_405b is llama31_405b."""
    plain = name.replace(".", "")
    return plain if plain in catalogue.models() else name


def _with_peaks(what: Identity) -> Identity:
    """With the FLOPs of a sample and the GPU's peak, where the catalogue knows model and GPU."""
    model, gpu = catalogue.models().get(what.model or ""), catalogue.gpus().get(what.gpu or "")
    return what._replace(
        flops_per_sample=model.flops(what.seq_length) if model and what.seq_length else None,
        peak_flops=gpu.peak_flops(what.precision) if gpu and what.precision else None,
    )


def _fits(value: Any, kind: type) -> bool:
    if kind is str:
        return isinstance(value, str) and value != ""
    is_number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return is_number and (1 if kind is int else 1e-30) <= value <= MOST  # NaN is not, either


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
