"""The spec that does a run again. In: a plan, as its JSON has it. Out: TOML.

Every number of the plan is set, so that neither another default nor another catalogue changes it. What the site profile
decides is left to the one here.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ftgen.catalogue import optimizations
from ftgen.documents import Document, get
from ftgen.errors import Problem, SpecError, dotted, quoted
from ftgen.plan.resolve import RECIPE_ENVIRONMENT
from ftgen.spec.spec import Spec
from ftgen.units import format_walltime
from ftgen.validation import validate

SAME = (
    *("engine", "scheme", "precision", "fp8_scaling", "gpus", "gpus_per_node", "max_steps", "epochs"),
    *("global_batch_size", "micro_batch_size", "seq_length", "seed", "lora", "optimizer"),
    *("validation", "export", "log", "profile"),
)
OF_A_DATASET = ("dataset", "revision", "config", "split", "columns")  # keys that only data.kind = "hf" may have
TREES = {"Megatron-LM": "megatron_lm", "NeMo": "nemo"}  # a source's folder in the plan, its key in the spec


def chat_template(plan: Mapping[str, Any]) -> str | None:
    """The text of the chat template of the run: the spec names a file that must have it."""
    text = get(plan, ("data", "chat_template"))
    return text if isinstance(text, str) else None


def spec_again(plan: Mapping[str, Any], file: str = "", template: str = "chat_template.jinja") -> str:
    """The spec as TOML. `template`: the file for the chat template, if the run has one.

    SpecError: the plan has not what a spec needs, or what this ftgen does not know."""
    document = _without_none(_document(plan, template))
    spec, problems = validate(Spec, document)
    if spec is None:
        raise SpecError(*(each._replace(file=file) for each in problems))
    return "".join(f"{line}\n" for line in _toml(document))


def _document(plan: Mapping[str, Any], template: str) -> Document:
    parallelism = {key: value for key, value in _table(plan, "parallelism").items() if key != "data_parallel_size"}
    on = {name: True for name, chosen in _table(plan, "optimizations").items() if chosen is True}
    if unknown := sorted(on.keys() - optimizations().keys()):
        what = f"this ftgen does not know the optimization {unknown[0]}, which the run had"
        raise SpecError(Problem(("optimizations",), what, "use the ftgen that made the run, or a later one"))
    return {
        **{key: plan.get(key) for key in SAME},
        "model": get(plan, ("model", "name")),
        "gpu": get(plan, ("gpu", "name")),
        "walltime": _walltime(get(plan, ("slurm", "walltime_s"))),
        "convert_walltime": _walltime(get(plan, ("slurm", "convert_walltime_s"))),
        "parallelism": parallelism,
        "data": _data(plan, template),
        "checkpoint": {key: get(plan, ("checkpoint", key)) for key in ("source", "revision", "path")},
        "sources": _sources(plan),
        "optimizations": {"preset": "stock", **on},
        "window": {"last_steps": plan.get("window_steps")},
        "save": {key: get(plan, ("save", key)) for key in ("every_steps", "keep")},
        "environment": {
            name: text for name, text in _table(plan, "environment").items() if RECIPE_ENVIRONMENT.get(name) != text
        },
    }


def _data(plan: Mapping[str, Any], template: str) -> Document:
    """Without what the plan computes: the order of the examples, and the text of the template in place of its file."""
    data = {key: value for key, value in _table(plan, "data").items() if key != "order"}
    if data.get("kind") != "hf":
        data = {key: value for key, value in data.items() if key not in OF_A_DATASET}
    return data | {"chat_template": template if chat_template(plan) else None}


def _walltime(seconds: Any) -> str | None:
    return format_walltime(seconds) if isinstance(seconds, int) else None


def _table(plan: Mapping[str, Any], key: str) -> Document:
    """A table of the plan; an empty one if the plan, which may be anybody's, has none."""
    found = plan.get(key)
    return found if isinstance(found, dict) else {}


def _sources(plan: Mapping[str, Any]) -> Document:
    found = plan.get("sources")
    trees = [tree for tree in found if isinstance(tree, dict)] if isinstance(found, list) else []
    names = [str(tree.get("folder")).rpartition("-")[0] for tree in trees]
    return {
        TREES.get(name, name): {"url": tree.get("url"), "commit": tree.get("commit")}
        for name, tree in zip(names, trees, strict=True)
    }


def _without_none(document: Document) -> Document:
    """TOML has no null: a key that is not there has the same meaning."""
    kept = {key: _without_none(value) if isinstance(value, dict) else value for key, value in document.items()}
    return {key: value for key, value in kept.items() if value not in (None, {})}


def _toml(document: Document, head: tuple[str, ...] = ()) -> Iterator[str]:
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    yield from (f"{dotted((key,))} = {_value(value)}" for key, value in document.items() if key not in tables)
    for key, table in tables.items():
        inside = (*head, key)
        if any(not isinstance(value, dict) for value in table.values()):
            yield f"\n[{dotted(inside)}]"
        yield from _toml(table, inside)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float):
        return repr(value)  # TOML reads 1e-05 and 0.1 as Python writes them
    return quoted(value) if isinstance(value, str) else json.dumps(value)
