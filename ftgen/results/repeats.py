"""Groups of repeats. In: `Summary`s. Out: a `Group` for each experiment: mean, standard deviation, number of runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ftgen.catalogue import Published
from ftgen.results.compare import Timed, mean, spread
from ftgen.results.summary import Summary


@dataclass(frozen=True)
class Group:
    """Runs of the same work with the same options on the same GPUs. The figures are those of the mean step time."""

    experiment: str
    engine: str | None
    model: str | None
    scheme: str | None
    precision: str | None
    gpu: str | None
    gpus: int | None
    global_batch_size: int | None
    seq_length: int | None  # tokens
    options: tuple[str, ...]  # how the plan differs from the recipe
    runs: int  # all of them
    counted: int  # the complete ones with a step time
    step_time_s: float | None  # the mean of the counted runs
    step_time_spread_s: float | None  # their sample standard deviation
    tokens_per_s: float | None
    mfu: float | None  # a fraction
    days_per_1t_tokens: float | None
    peak_memory_gib: float | None  # the highest
    published: Published | None


def kind(run: Summary | Group) -> tuple[str, ...]:
    """Runs of one kind share a table. A run of unknown kind has a table of its own."""
    parts = tuple(str(part or "") for part in (run.model, run.scheme, run.precision))
    return parts if all(parts) else (*parts, run.experiment)


def size(run: Summary | Group) -> tuple[int | str, ...]:
    """Runs of one kind and size are comparable."""
    return (run.gpus or 0, run.global_batch_size or 0, run.seq_length or 0, run.gpu or "")


def way(run: Summary | Group) -> tuple[object, ...]:
    """Runs of one kind, size and options are repeats of each other."""
    known = (run.model, run.scheme, run.precision, run.gpus, run.global_batch_size, run.seq_length, run.gpu)
    alone = getattr(run, "log", "") if None in known else ""  # unknown is never equal to unknown
    return (kind(run), size(run), run.options, alone)


def order(run: Summary) -> tuple[object, ...]:
    """The recipe's order: SFT before LoRA, BF16 before FP8; then by size, then by id as a number."""
    known = (run.model or "~", -ord((run.scheme or "~")[0]), run.precision or "~")
    return (*known, kind(run), size(run), run.options, len(run.run_id), run.run_id, run.log)


def group(runs: Sequence[Summary]) -> list[Group]:
    """One group for each experiment, in the recipe's order."""
    return [_group(list(same)) for _, same in groupby(sorted(runs, key=order), way)]


def _group(runs: list[Summary]) -> Group:
    counted = [run for run in runs if run.status == "complete" and run.step_time_s]
    figures = mean(counted) if counted else Timed(None, None, None, None)
    what = counted[0] if counted else runs[0]
    return Group(
        experiment=what.experiment,
        engine=what.engine,
        model=what.model,
        scheme=what.scheme,
        precision=what.precision,
        gpu=what.gpu,
        gpus=what.gpus,
        global_batch_size=what.global_batch_size,
        seq_length=what.seq_length,
        options=what.options,
        runs=len(runs),
        counted=len(counted),
        step_time_spread_s=spread(counted),
        peak_memory_gib=max((run.peak_memory_gib for run in counted if run.peak_memory_gib), default=None),
        published=what.published,
        **figures._asdict(),
    )
