"""The name of the way in which a run's work was done.

In: a plan and an environment, as their JSON has them. Out: `stock`, `TP 2, default`, …

Stock has no optimization on. Default has those on that the catalogue puts on for the run's scheme, precision and GPU, as far
as the run can have them. All else is named by its difference from the nearer of the two. A plan of an earlier ftgen lacks
the optimizations that came later: only the names that it has are compared, and a default without all of today's is `earlier
default`. A run without a plan has no known variant.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ftgen import catalogue
from ftgen.documents import get
from ftgen.results.options import RECIPE_ENGINE, off, other_work, sizes
from ftgen.results.repeats import kind, size
from ftgen.results.summary import Summary

STOCK, DEFAULT, EARLIER = "stock", "default", "earlier default"
UNKNOWN_VARIANT = "run"


def variant(plan: Mapping[str, Any] | None, environment: Mapping[str, Any] | None = None) -> str:
    """`stock`, `default`, `default + a − b`, `stock + a`, with the sizes before it; empty where the plan does not tell."""
    if not plan:
        return ""
    chosen = plan.get("optimizations")
    way = _way(plan, chosen | dict.fromkeys(off(environment), False)) if isinstance(chosen, dict) else ""
    return ", ".join(filter(None, (*sizes(plan), *other_work(plan), way)))


def numbered(runs: Sequence[Summary], variants: Sequence[str]) -> list[str]:
    """The runs' names: the variant, with a number in the order of time where several runs of a work have the same."""
    same: dict[tuple[object, str], list[int]] = {}
    for index, (run, name) in enumerate(zip(runs, variants, strict=True)):
        same.setdefault(((kind(run), size(run)), name), []).append(index)
    names = list(variants)
    for (_, name), found in same.items():
        timed = all(runs[index].started for index in found)
        for number, index in enumerate(sorted(found, key=lambda index: _age(runs[index], timed=timed)), 1):
            names[index] = f"{name or UNKNOWN_VARIANT} {number}" if len(found) > 1 or not name else name
    return names


def _way(plan: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    on = {str(name) for name, value in chosen.items() if value is True}
    possible = {name for name in _defaults(plan) if _is_possible(name, plan)}
    default = possible & chosen.keys()
    if not on:
        return STOCK
    if len(on) <= len(on ^ default):
        return " ".join([STOCK, *(f"+ {name}" for name in sorted(on))])
    base = DEFAULT if possible <= chosen.keys() else EARLIER
    return " ".join([base, *(f"+ {name}" for name in sorted(on - default)), *(f"− {name}" for name in sorted(default - on))])


def _defaults(plan: Mapping[str, Any]) -> list[str]:
    """What the catalogue puts on for the run's scheme, precision and GPU."""
    what = [str(get(plan, path)) for path in (("scheme",), ("precision",), ("gpu", "name"))]
    what.append(str(get(plan, ("engine",)) or RECIPE_ENGINE))
    return [name for name, known in catalogue.optimizations().items() if known.is_default(*what)]


def _is_possible(name: str, plan: Mapping[str, Any]) -> bool:
    """Whether a run can have a default optimization; a test compares this with what the compiler allows."""
    split = [get(plan, ("parallelism", f"{which}_parallel_size")) for which in ("tensor_model", "pipeline_model", "context")]
    tp, pp, cp = (size if isinstance(size, int) else 1 for size in split)
    packed = get(plan, ("data", "packed")) is not False
    targets = get(plan, ("lora", "targets"))
    adapted = set(map(str, targets)) if isinstance(targets, list) else set()
    possible = {
        "cuda_graphs": packed and pp * cp == 1,
        "fused_cross_entropy": get(plan, ("micro_batch_size",)) in (1, None),
        "loss_tokens_only": tp * pp * cp == 1,
        "scale_small_tensor": tp == 1 and not get(plan, ("lora", "dropout")),
        "async_step": not get(plan, ("log",)),
        "short_padding": packed and cp == 1,
        "fused_rotary": packed and cp == 1,
        "short_attention": packed and cp == 1,
        "fused_lora_add": tp == 1 and not get(plan, ("lora", "dropout")),
        "fused_swiglu": tp == 1 and not {"linear_fc1", "linear_fc2"} & adapted,
    }
    return possible.get(catalogue.optimizations()[name].builds_on or name, True)


def _age(run: Summary, *, timed: bool) -> tuple[datetime, int, str]:
    """Runs by time; by their ids, which Slurm counts up, where the time of one is not known."""
    return (run.started if timed and run.started else datetime.min, len(run.run_id), run.run_id)
