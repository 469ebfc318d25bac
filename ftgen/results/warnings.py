"""Reasons to distrust a figure. In: a `Log` and the steps of its window. Out: a sentence for each warning.

A log states most facts twice: a step's number and the samples consumed until then, its time and its TFLOPS, the plan and
what ran. If the two disagree, one of them is wrong, and a warning tells the reader. Every threshold is a fraction, and
healthy runs stay below it.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ftgen.logs.identity import Identity
from ftgen.logs.log import Log
from ftgen.logs.step import Step
from ftgen.results.window import Timed, count

OUTLIER = 0.05  # distance of a step's time from the window's median
SPREAD = 0.03  # standard deviation of the window's times, by their mean
TREND = 0.02  # distance of the median of the window's second half from that of the first half
RANKS = 0.05  # distance of the slowest rank's time of a step from the fastest rank's
TFLOPS = 0.05  # distance of logged from recomputed TFLOPS: frameworks count different operations
FEW = 4  # times that a window must have at least, if the run does not log every step
SFT_WORK = 1.5  # of LoRA's
SHORTEST_WRAP, WRAPPED = 40, 0.5  # characters of a wrapped line; share of unread lines that come after one as long
MISFIT = 0.005  # distance of a step's time x TFLOPS from the window's median: each number has four digits
MEMORY = 0.01  # distance of a peak memory that only one step reports from the next lower peak
SECOND_DIGIT_S = 0.0051  # Megatron-Bridge's second line has two decimals


def warnings(what: Identity, log: Log, window: Timed, tflops_per_gpu: float | None) -> Iterator[str]:
    """Every warning; `tflops_per_gpu` is recomputed from the window's mean, in TFLOP/s."""
    yield from log.problems
    yield from _bad_nodes(log)
    if log.damaged:
        yield _unread(log)
    if log.accumulated:
        bars = 1 + round(log.accumulated / max(len(log.steps), 1))
        yield f"about {bars} bars tell of each global_step (gradient accumulation): none has the time of a whole step"
    if log.skipped and not set(log.skipped).isdisjoint(window.steps):
        yield f"fp16 skipped step {next(number for number in log.skipped if number in window.steps)}, which is in the window"
    steps = window.steps
    yield from _other_plan(what, log, steps)
    yield from _samples(what, steps)
    yield from _memory(steps)
    if not window.times_s:
        return
    if window.every > 1 and len(window.times_s) < FEW:
        yield f"the window has only {count(len(window.times_s), 'logged step time')}"
    least, most = min(window.times_s), max(window.times_s)
    if most - least > min(OUTLIER, SPREAD, TREND) * least:  # below that, no warning is possible
        yield from _outliers(window)
        yield from _trend(window)
    if any(_values(steps, "fastest_s")):
        yield from _ranks(steps)
    if log.step_times or any(_values(steps, "tflops_per_gpu")):
        yield from _tflops(what, log, window, tflops_per_gpu)


def _bad_nodes(log: Log) -> Iterator[str]:
    """Nodes that were not well before the first step: a slow figure may be theirs, not the software's."""
    for name, found in sorted(log.nodes.items()):
        if found.get("state") == "bad":
            problems = found.get("problems")
            said = "; ".join(map(str, problems)) if isinstance(problems, list) else ""
            yield f"node {name} was not well: {said or 'the log does not say why'}"


def _unread(log: Log) -> str:
    """Step lines that could not be read, and why that may be."""
    ((width, times),) = log.widths.most_common(1)
    if width > SHORTEST_WRAP and times > 2 and times > log.damaged * WRAPPED:
        return f"{count(log.damaged, 'step line')} cannot be read: lines are wrapped after {width - 1} characters"
    if not log.steps:
        return f"{count(log.damaged, 'step line')} of a form that ftgen does not know"
    return f"ftgen could not read {count(log.damaged, 'damaged step line')}"


def _other_plan(what: Identity, log: Log, steps: Mapping[int, Step]) -> Iterator[str]:
    """Sizes that differ from the plan, or within the window."""
    batch = what.global_batch_size
    others = _values(steps, "global_batch_size") - {batch, None}
    if batch and others:
        yield f"the log has steps with global_batch_size {min(filter(None, others))}, but the figures are for {batch}"
    planned = what.max_steps or log.steps.planned
    counted = _values(steps, "planned") - {planned, None}
    if counted and planned:
        yield f"step lines count to {count(min(filter(None, counted)), 'step')}, but the run was planned with {planned}"


def _samples(what: Identity, steps: Mapping[int, Step]) -> Iterator[str]:
    """Consumed samples that do not match the number of steps."""
    for number, step in steps.items():
        samples, batch = step.consumed_samples, what.global_batch_size or step.global_batch_size
        if samples is not None and batch and samples != (number + 1) * batch:
            yield (
                f"step {number} reports consumed_samples {samples:.0f}, "
                f"but {count(number + 1, 'step')} of {batch} samples make {(number + 1) * batch}"
            )
            return
    if not what.global_batch_size and any(_values(steps, "consumed_samples")):
        yield "the global batch size cannot be computed from consumed_samples"


def _memory(steps: Mapping[int, Step]) -> Iterator[str]:
    if len(_values(steps, "peak_memory")) < 2:
        return
    peaks = sorted((step.peak_memory, number) for number, step in steps.items() if step.peak_memory)
    if len(peaks) > 1 and peaks[-2][0] < peaks[-1][0] * (1 - MEMORY):
        (others, _), (most, number) = peaks[-2:]
        peak, next_peak = f"{most / 2**30:.1f} GiB", f"{others / 2**30:.1f} GiB"
        yield f"only step {number} reports a peak memory of {peak}; the other steps report at most {next_peak}"


def _values(steps: Mapping[int, Step], name: str) -> set[Any]:
    """What the steps say of one thing."""
    return {getattr(step, name) for step in steps.values()}


def median(numbers: Iterable[float]) -> float:
    """The median. The import is here because it is slow and few logs need it."""
    from statistics import median as middle

    return middle(numbers)


def _outliers(window: Timed) -> Iterator[str]:
    middle = median(window.times_s)
    if max(max(window.times_s) - middle, middle - min(window.times_s)) > OUTLIER * middle:
        distances = zip((abs(time_s - middle) for time_s in window.times_s), window.steps, strict=True)
        far = [(distance, number) for distance, number in distances if distance > OUTLIER * middle]
        _, worst = max(far)
        yield (
            f"the window has {count(len(far), 'outlier')} in {count(len(window.times_s), 'step')}, more than {OUTLIER:.0%} "
            f"from the median of {middle:.4g} s; step {worst} took {window.steps[worst].time_s:.4g} s"
        )
    if window.spread is not None and window.spread > SPREAD:
        yield f"the standard deviation of the window's step times is {window.spread:.1%} of their mean"


def _trend(window: Timed) -> Iterator[str]:
    half = len(window.times_s) // 2
    if half < 5:
        return
    first, second = median(window.times_s[:half]), median(window.times_s[-half:])
    if abs(second / first - 1) > TREND:
        way = "slower" if second > first else "faster"
        yield f"the second half of the window is {abs(second / first - 1):.1%} {way} than the first half"


def _ranks(steps: Mapping[int, Step]) -> Iterator[str]:
    for number, step in steps.items():
        if step.fastest_s and step.time_s and step.time_s > step.fastest_s * (1 + RANKS):
            yield f"several lines give step {number} {step.fastest_s:.4g} to {step.time_s:.4g} s; the slowest counts"
            return


def _tflops(what: Identity, log: Log, window: Timed, recomputed: float | None) -> Iterator[str]:
    """Logged TFLOPS that contradict the step's own time or the recipe's formula."""
    for number, other in log.other_lines(window.steps).items():
        time_s = window.steps[number].time_s or 0.0
        if abs(other.time_s - time_s) > SECOND_DIGIT_S + MISFIT * time_s:
            yield f"one line gives step {number} {time_s:.4g} s, and the other line {other.time_s:.4g} s"
            break
    logged = _logged(log, window)
    if not logged:
        return
    work = {number: tflops * (window.steps[number].time_s or 0.0) for number, tflops in logged.items()}
    usual = median(work.values())
    misfit = [number for number, amount in work.items() if abs(amount - usual) > MISFIT * usual]
    if misfit:
        yield f"the time and the TFLOPS of step {misfit[0]} contradict each other"
    mean = sum(logged.values()) / len(logged)
    if recomputed and abs(mean / recomputed - 1) > TFLOPS:
        why = _why(what, mean, recomputed)
        yield f"the log reports {mean:.4g} TFLOPS per GPU, but the step time gives {recomputed:.4g}{why}"


def _why(what: Identity, logged: float, recomputed: float) -> str:
    """Why a framework counts other FLOPs, where that is known."""
    if what.scheme == "lora" and abs(logged / recomputed / SFT_WORK - 1) < SFT_WORK - 1:
        return ": the framework counts the work of a full fine-tune, LoRA does two thirds of it"
    return ""


def logged_tflops(log: Log, window: Timed) -> float | None:
    """TFLOP/s of one GPU as the framework logs them, the mean of the window."""
    logged = _logged(log, window)
    return sum(logged.values()) / len(logged) if logged else None


def _logged(log: Log, window: Timed) -> dict[int, float]:
    logged = {number: step.tflops_per_gpu for number, step in window.steps.items() if step.tflops_per_gpu}
    return {number: other.tflops_per_gpu for number, other in log.other_lines(window.steps).items()} | logged
