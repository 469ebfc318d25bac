"""Figures beside a baseline. In: `Summary`s, and the published figures or earlier results. Out: ratios, regressions.

The step time decides, because it is measured and the other figures follow from it. A published row is therefore compared
by its step time; a table shows its other figures beside those that follow from the step time.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ftgen import catalogue
from ftgen.catalogue import Publication, Published
from ftgen.errors import LogError, Problem
from ftgen.logs.identity import from_log, is_name
from ftgen.results.options import ENGINE, RECIPE_TARGETS, engine_of
from ftgen.results.summary import SECONDS_PER_DAY, TRILLION, model_flops_utilization, tokens_per_s

PUBLISHED = "published"
TOLERANCE = 0.05  # a step may be slower by this fraction
FORMAT = 1  # of the JSON results

OPTIONS_OF_ENGINES = ("", f"{ENGINE}megatron_bridge")
Work = tuple[object, ...]  # what two runs must share to be comparable


class Figures(Protocol):
    """The figures of the recipe's tables, of a run or as published."""

    @property
    def step_time_s(self) -> float | None: ...  # noqa: D102

    @property
    def tokens_per_s(self) -> float | None: ...  # noqa: D102

    @property
    def mfu(self) -> float | None: ...  # noqa: D102

    @property
    def days_per_1t_tokens(self) -> float | None: ...  # noqa: D102


class Timed(NamedTuple):
    """Figures that follow from a step time, or their ratios to a baseline."""

    step_time_s: float | None
    tokens_per_s: float | None
    mfu: float | None  # a fraction
    days_per_1t_tokens: float | None


class Baseline(NamedTuple):
    """The figures that runs are compared with, and how much slower a step may be."""

    name: str  # `published`, or the name of the file
    figures: Mapping[Work, Figures]
    tolerance: float = TOLERANCE  # a fraction
    sources: Mapping[Work, str] = {}  # the publication of each figure
    noise: Mapping[Work, float] = {}  # how much slower a step may be by chance, as a fraction, where repeats tell
    across_engines: bool = False  # compare each run with the other engine's

    def of(self, run: Figures) -> Figures | None:
        """The baseline's figures for the same work; None if it has none."""
        work = self._found(run)
        return self.figures[work] if work else None

    def source(self, run: Figures) -> str | None:
        """The publication that the figures for this work are from; None for measured ones."""
        work = self._found(run)
        return self.sources.get(work) if work else None

    def _found(self, run: Figures) -> Work | None:
        if self.name == PUBLISHED:
            kind = _kind(options_of(run))
            keys: list[Work] = [(*work_of(run, gpu=gpu), kind) for gpu in (True, False)]
        else:
            own, *rest = _engine_and_options(run)
            engines = [engine for engine in OPTIONS_OF_ENGINES if (engine != own) == self.across_engines]
            work = work_of(run, gpu=True)
            keys = [key for engine in engines for key in ((*work, engine, *rest), (*work, engine))]
        return next((work for work in keys if work in self.figures), None)

    def ratio(self, run: Figures) -> float | None:
        """The run's step time by the baseline's: above 1 is slower."""
        there = self.of(run)
        return ratios(run, there).step_time_s if there else None

    def allowed(self, run: Figures) -> float:
        """How much slower a step may be, as a fraction: the noise of repeats, or else the tolerance."""
        work = self._found(run)
        return self.noise.get(work, self.tolerance) if work else self.tolerance

    def regressed(self, run: Figures) -> bool | None:
        """Whether the step is slower than is allowed; None if there is no ratio."""
        ratio = self.ratio(run)
        return None if ratio is None else ratio > 1 + self.allowed(run)


def published(tolerance: float = TOLERANCE) -> Baseline:
    """The recipes' step times, those of other publications for other work, and the figures that follow from them.

    Figures for the same GPU come first. A recipe's figures also compare with runs on any other GPU.
    """
    figures: dict[Work, Figures] = {}
    sources: dict[Work, str] = {}
    for publication in catalogue.publications():
        for row in publication.results:
            if row.time_of_step_s:
                for gpu in (True, False) if publication.recipe else (True,):
                    work = (*work_of(row, gpu=gpu), _published_kind(publication, row))
                    figures.setdefault(work, recomputed(row))
                    sources.setdefault(work, publication.title)
    return Baseline(PUBLISHED, figures, tolerance, sources)


def _kind(options: Sequence[str]) -> tuple[bool, str]:
    """Whether the examples were packed, and LoRA's targets."""
    targets = [word.removeprefix("LoRA on ") for word in options if word.startswith("LoRA on ")]
    return "not packed" not in options, targets[0] if targets else "+".join(RECIPE_TARGETS)


def _published_kind(publication: Publication, row: Published) -> tuple[bool | None, str]:
    targets = publication.lora_targets if row.scheme == "lora" else RECIPE_TARGETS
    return publication.packed, "+".join(targets)


def measured(name: str, runs: Iterable[Figures], tolerance: float = TOLERANCE, *, across_engines: bool = False) -> Baseline:
    """The mean step times of runs, by their work, engine and options.

    Also by work and engine alone, if all such runs have the same options.
    """
    same: dict[Work, list[Figures]] = {}
    for run in runs:
        same.setdefault(way_of(run), []).append(run)
    figures: dict[Work, Figures] = {work: mean(repeats) for work, repeats in same.items()}
    ways = Counter(work[:-1] for work in figures)
    alone = {work[:-1]: found for work, found in figures.items() if ways[work[:-1]] == 1}
    return Baseline(name, figures | alone, tolerance, across_engines=across_engines)


def read_tolerance(text: str) -> float:
    """`5%` or `0.05` as a fraction; LogError for anything else."""
    number, per_cent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        tolerance = float(number) / (100 if per_cent else 1)
    except ValueError:
        tolerance = math.nan
    if not 0 <= tolerance < 10:
        raise LogError(Problem(("tolerance",), f"must be a percentage (5%) or a fraction (0.05), found {text}"))
    return tolerance


def work_of(of: Any, *, gpu: bool) -> Work:
    """The work of a run, with its GPU or without.

    Unknown is never equal to unknown: such a run compares only with one of the same experiment, or with none.
    """
    work: Work = (of.model, of.scheme, of.precision, of.gpus, of.global_batch_size, of.seq_length)
    work = (*work, of.gpu) if gpu else work
    if None not in work:
        return work
    return (of.experiment, *work) if is_name(of.experiment) else (object(),)


def way_of(of: Any) -> Work:
    """The work of a run, its engine and its options."""
    return (*work_of(of, gpu=True), *_engine_and_options(of))


def _engine_and_options(of: Any) -> tuple[str, tuple[str, ...]]:
    words = options_of(of)
    engine = engine_of(words)
    return engine, tuple(word for word in words if word != engine)


def options_of(of: Any) -> tuple[str, ...]:
    """How a run differs from the recipe; nothing for what has no options."""
    return tuple(getattr(of, "options", ()))


def mean(runs: Sequence[Figures]) -> Timed:
    """The figures of the mean step time of repeats; None for each if no repeat has a step time."""
    times = [run.step_time_s for run in runs if run.step_time_s]
    return scaled(runs[0], math.fsum(times) / len(times)) if times else Timed(None, None, None, None)


def spread(runs: Sequence[Figures]) -> float | None:
    """The sample standard deviation of the repeats' step times, in seconds; None for fewer than two."""
    times = [run.step_time_s for run in runs if run.step_time_s]
    return statistics.stdev(times) if len(times) > 1 else None


def scaled(run: Figures, time_s: float) -> Timed:
    """The figures of the same work with another step time."""
    longer = time_s / run.step_time_s if run.step_time_s else None
    if not longer:
        return Timed(time_s, None, None, None)
    tokens, mfu, days = run.tokens_per_s, run.mfu, run.days_per_1t_tokens
    return Timed(time_s, tokens and tokens / longer, mfu and mfu / longer, days and days * longer)


def ratios(run: Figures, by: Figures) -> Timed:
    """Each figure divided by the other run's; None if either is missing."""
    pairs = ((getattr(run, key), getattr(by, key)) for key in Timed._fields)
    return Timed(*(mine / other if mine and other else None for mine, other in pairs))


def recomputed(row: Published) -> Timed:
    """The figures that the recipe's formulas give for a published step time, or for the one that follows from tokens/s."""
    name, time_s = f"{row.scheme}_nemo_{row.model}_{row.precision}_{row.gpus}", row.time_of_step_s
    said = {"gpus": str(row.gpus), "gpu": row.gpu, "seq_length": str(row.seq_length)}
    what = from_log(name, row.global_batch_size, said)
    tokens = tokens_per_s(what, time_s)
    days = TRILLION / tokens / SECONDS_PER_DAY if tokens else None
    return Timed(time_s, tokens, model_flops_utilization(what, time_s), days)


def contradicts_itself(row: Published) -> bool:
    """Whether no step time that rounds to the published one gives the published tokens/s."""
    if not (row.step_time_s and row.tokens_per_s):
        return False
    decimals = len(f"{row.step_time_s:.9f}".rstrip("0").partition(".")[2])
    half = 0.5 * 10.0 ** -max(decimals, 2)  # the tables print two or three decimals
    work = row.global_batch_size * row.seq_length
    fewest, most = work / (row.step_time_s + half), work / (row.step_time_s - half)
    return not math.floor(fewest) <= row.tokens_per_s <= math.ceil(most)
