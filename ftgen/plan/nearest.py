"""Finds the measured runs nearest to a plan, and the step time that they give it.

In: `Measured` rows; one of them is the work whose step time is asked for. Out: a `Guess`, or the reason why there is none.
Pure.

Runs of the same kind share model, GPU, scheme, precision, engine, split and data. The nearest of them count: first those
with the same optimizations, then those with the same number of GPUs, then those with as many tokens for a GPU. Their step
time is scaled by the tokens of a GPU in a step, which for one model are its FLOPs, and by the measured growth with the
number of GPUs.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from ftgen import catalogue
from ftgen.catalogue.measurements import HISTORY, MEASURED, PUBLISHED, Measured

SCHEMES = {"sft": "SFT", "lora": "LoRA"}
FARTHEST = 7  # optimizations that may differ
PREFERRED = (HISTORY, MEASURED, PUBLISHED)
GPUS_PER_NODE = 8  # of a GPU that is not in the catalogue


class Way(NamedTuple):
    """How a forecast was made. Errors are compared within one way."""

    optimizations: bool  # the runs had other optimizations
    gpus: bool  # the runs had another number of GPUs
    tokens: bool  # the runs had more or fewer tokens for a GPU
    published: bool  # the runs are others' and the plan is not, or the other way round

    def __str__(self) -> str:
        """In words."""
        words = {"other optimizations": self.optimizations, "another number of GPUs": self.gpus, "other tokens": self.tokens}
        said = [word for word, there in words.items() if there] or ["the same work"]
        return " and ".join(said) + (", published" if self.published else "")

    def covers(self, other: "Way") -> bool:
        """Whether this way differs from the plan at least in what the other one does."""
        return self.published == other.published and all(mine >= theirs for mine, theirs in zip(self, other, strict=True))


class Guess(NamedTuple):
    """A step time and what it rests on."""

    step_time_s: float
    rows: tuple[Measured, ...]
    way: Way
    doublings: float = 0.0  # of the number of GPUs, from the rows to the plan
    growth: float = 0.0  # of the step time, for each of them, as a fraction
    beyond: tuple[str, ...] = ()  # up to which number of GPUs growth was measured, where the plan needs more


def nearest(work: Measured, rows: Iterable[Measured]) -> Guess | str:
    """The step time by the nearest rows; a text that says why there is none."""
    every = list(rows)
    same = [row for row in every if kind(row) == kind(work) and _fits(row.split, work.split)]
    near = [row for row in same if _may_stand_for(row, work)]
    if not near:
        what = f"{named(work)} of {work.model} on {work.gpu} with {work.engine}"
        return f"no measured run of {what}, " + ("with such optimizations" if same else "with this split and data")
    scaled = [(row, growth) for row in near if (growth := _growth(row, work, every)) is not None]
    if not scaled:
        return f"no measured run tells how {named(work)} scales from {near[0].gpus} to {work.gpus} GPUs"
    least = min(_distance(row, work) for row, _ in scaled)
    chosen = [(row, growth) for row, growth in scaled if _distance(row, work) == least]
    times = [row.step_time_s * work.tokens_of_gpu / row.tokens_of_gpu * math.exp(growth.log) for row, growth in chosen]
    row, growth = chosen[0]
    doublings = math.log2(work.gpus / row.gpus)
    per_doubling = math.expm1(growth.log / doublings) if doublings else 0.0
    rows_chosen = tuple(row for row, _ in chosen)
    return Guess(median(times), rows_chosen, _way(row, work), abs(doublings), per_doubling, growth.beyond)


def held_out(rows: Sequence[Measured]) -> Iterator[tuple[Measured, Guess]]:
    """Each row forecast from the others, in each way that they allow."""
    for number, row in enumerate(rows):
        others = [*rows[:number], *rows[number + 1 :]]
        yield from ((row, guess) for guess in _each_way(row, others))


def error_of(row: Measured, guess: Guess) -> float:
    """The error of a forecast of a measured row, as a fraction of the measured step time."""
    return guess.step_time_s / row.step_time_s - 1


def _each_way(row: Measured, others: Sequence[Measured]) -> Iterator[Guess]:
    """The nearest rows first; then without the rows that came so near, until there are none."""
    left = list(others)
    while not isinstance(guess := nearest(row, left), str):
        yield guess
        used = set(guess.rows)
        left = [other for other in left if other not in used]


@cache
def kind(row: Measured) -> tuple[object, ...]:
    """What rows must share."""
    return (
        _architecture(row.model),
        *(row.gpu, row.scheme, row.precision, row.engine, row.micro_batch_size, row.packed, row.fp8_scaling),
        tuple(sorted(row.lora_targets)),
    )


def _architecture(model: str) -> object:
    """The sizes of the model, which decide the speed: Llama 3 and 3.1 have the same."""
    known = catalogue.models().get(model)
    if not known:
        return model
    sizes = (known.num_layers, known.hidden_size, known.ffn_hidden_size, known.vocab_size)
    return (*sizes, known.num_attention_heads, known.num_query_groups, known.head_size)


def _fits(split: tuple[int, ...] | None, other: tuple[int, ...] | None) -> bool:
    return split is None or other is None or split == other


def _may_stand_for(row: Measured, work: Measured) -> bool:
    """Whether the optimizations are near enough. The stock recipe stands for no other, except as published."""
    if bool(row.optimizations) != bool(work.optimizations):
        return row.origin == PUBLISHED
    return _differing(row, work) <= FARTHEST


def _differing(row: Measured, work: Measured) -> int:
    return len({*row.optimizations} ^ {*work.optimizations})


def _distance(row: Measured, work: Measured) -> tuple[object, ...]:
    """How far a row is from the work, the most important first."""
    tokens = round(abs(math.log(work.tokens_of_gpu / row.tokens_of_gpu)), 6)
    stock_for_another = bool(row.optimizations) != bool(work.optimizations)
    gpus = abs(math.log2(work.gpus / row.gpus))
    own = work.origin == PUBLISHED and row.origin == PUBLISHED
    return (stock_for_another, _differing(row, work), gpus, tokens, 0 if own else 1 + PREFERRED.index(row.origin))


def _way(row: Measured, work: Measured) -> Way:
    return Way(
        optimizations=_differing(row, work) > 0,
        gpus=row.gpus != work.gpus,
        tokens=not math.isclose(row.tokens_of_gpu, work.tokens_of_gpu),
        published=(row.origin == PUBLISHED) != (work.origin == PUBLISHED),
    )


class Growth(NamedTuple):
    """How the step time grows with the number of GPUs."""

    log: float = 0.0  # its natural logarithm
    beyond: tuple[str, ...] = ()  # as a guess has it


def _growth(row: Measured, work: Measured, rows: Sequence[Measured]) -> Growth | None:
    """The growth from the row's number of GPUs to the work's; None: nobody has measured it."""
    total = Growth()
    most = max(row.gpus, work.gpus)
    for inside, doublings in zip((True, False), _doublings(row.gpus, work.gpus, row.gpu), strict=True):
        if doublings:
            each = _growth_of_a_doubling(work, rows, inside=inside)
            if each is None:
                return None
            log, reached = each
            short = reached < (min(most, _node(row.gpu)) if inside else most)
            said = f"measured {'inside a node' if inside else 'between nodes'} on up to {reached} GPUs"
            total = Growth(total.log + log * doublings, (*total.beyond, *([said] if short else [])))
    return total


def _doublings(first: int, second: int, gpu: str) -> tuple[float, float]:
    """How often the number of GPUs doubles inside a node, and from node to node. Negative: it halves."""
    node = _node(gpu)
    inside = math.log2(min(second, node) / min(first, node))
    return inside, math.log2(second / first) - inside


def _node(gpu: str) -> int:
    known = catalogue.gpus().get(gpu)
    return known.gpus_per_node if known else GPUS_PER_NODE


def _growth_of_a_doubling(work: Measured, rows: Sequence[Measured], *, inside: bool) -> tuple[float, int] | None:
    """The median over pairs of rows that differ in their number of GPUs alone, and the largest such number.

    The pairs of the same scheme and precision that are most like the work count.
    """
    found = []
    for first, second in _pairs(rows):
        in_node, between = _doublings(first.gpus, second.gpus, first.gpu)
        if recipe(first)[:2] == recipe(work)[:2] and bool(in_node) == inside and bool(between) != inside:
            growth = math.log(second.step_time_s / first.step_time_s) / (in_node + between)
            found.append((first, growth, second.gpus))
    alike: list[Callable[[Measured], bool]] = [
        lambda row: _architecture(row.model) == _architecture(work.model) and recipe(row) == recipe(work),
        lambda row: _architecture(row.model) == _architecture(work.model),
        lambda row: recipe(row) == recipe(work),
        lambda _: True,
    ]
    some = next((some for is_alike in alike if (some := [each for each in found if is_alike(each[0])])), None)
    return (median(growth for _, growth, _ in some), max(gpus for *_, gpus in some)) if some else None


def _pairs(rows: Sequence[Measured]) -> Iterator[tuple[Measured, Measured]]:
    """Median rows of the same kind, optimizations and tokens of a GPU, with fewer and with more GPUs."""
    alike: dict[tuple[object, ...], dict[int, list[Measured]]] = {}
    for row in rows:
        key = (kind(row), row.split, row.optimizations, row.source, round(row.tokens_of_gpu, 3))
        alike.setdefault(key, {}).setdefault(row.gpus, []).append(row)
    for by_gpus in alike.values():
        sizes = sorted(by_gpus)
        middle = {
            gpus: by_gpus[gpus][0]._replace(step_time_s=median(row.step_time_s for row in by_gpus[gpus])) for gpus in sizes
        }
        yield from ((middle[fewer], middle[more]) for fewer, more in pairwise(sizes))


def recipe(row: Measured) -> tuple[str, str, bool]:
    """Scheme, precision, and whether it has optimizations."""
    return row.scheme, row.precision, bool(row.optimizations)


def named(row: Measured) -> str:
    """LoRA FP8."""
    return f"{SCHEMES.get(row.scheme, row.scheme)} {row.precision.upper()}"
