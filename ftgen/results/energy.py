"""Energy, power, clocks and throttling of a run's GPUs in its window, and what the run cost.

In: a `Run`, its `Log` and its window. Out: an `Energy`. A figure that cannot be known is None, and a note says why.

The energy between two times is the difference of the GPU's own counter, interpolated between the samples beside each time;
without a counter it is the integral of the power.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ftgen.documents import get
from ftgen.logs.find import Run
from ftgen.logs.identity import MOST, Identity
from ftgen.logs.log import Log
from ftgen.logs.telemetry import Attempt, Node, read
from ftgen.results.window import Timed, count

JOULES_PER_KWH = 3.6e6
SECONDS_PER_HOUR = 3600
MILLION = 1e6  # tokens
LONGEST_GAP_S = 5.0  # between two samples: beyond it nobody knows what the power was
FEW = 5  # samples of a GPU that a window must have at least
HELD_BACK = 0.01  # share of the window from which on a reason other than the power cap is worth a warning
POWER_CAP = "power cap"
# Bits of nvmlClocksEventReasons (nvml.h) that hold the clock back. Others say that the GPU is idle, or name a chosen clock.
REASONS = {
    0x4: POWER_CAP,
    0x8: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "thermal slowdown by hardware",
    0x80: "power brake",
}

Spans = list[tuple[Attempt, float, float]]  # an attempt of a node, from one time to another


class Energy(NamedTuple):
    """What the telemetry gives."""

    joules_per_token: float | None = None  # of all GPUs, by the tokens of the window
    gpu_power_w: float | None = None  # mean of the GPUs in the window
    sm_clock_mhz: float | None = None  # mean of the GPUs in the window
    throttled: float | None = None  # a fraction of the window
    throttle_reasons: tuple[str, ...] = ()  # with the fraction of each
    max_temperature_c: float | None = None  # of any GPU in the window
    energy_kwh: float | None = None  # of all GPUs and attempts
    cost: float | None = None
    cost_per_million_tokens: float | None = None
    currency: str | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def energy(run: Run, log: Log, window: Timed, total_time_s: float | None) -> Energy:
    """The figures of a run; those of its window only if it has a step time. `total_time_s`: of all attempts, if known."""
    what = log.identity
    nodes, problems = read(run.telemetry) if run.telemetry and not log.before and "#" not in run.run_id else ([], [])
    found = Energy(notes=tuple(problems))
    if nodes:
        found = found._replace(energy_kwh=_of_the_run(nodes, what.gpus))
        if window.mean_s:
            found = _of_the_window(found, nodes, what, window)
    return found._replace(**_cost(log, window, total_time_s or _covered_s(nodes)))


def _of_the_window(found: Energy, nodes: Sequence[Node], what: Identity, window: Timed) -> Energy:
    known = [spans for node in nodes if (spans := _spans(node, window))]
    gpus = sum(each[0][0].gpus for each in known)
    if not known:
        return found._replace(notes=(*found.notes, "the telemetry does not have the ends of the window's steps"))
    notes = found.notes
    if what.gpus and gpus != what.gpus:
        notes = (*notes, f"the telemetry has {gpus} of {what.gpus} GPUs in the window: no joules per token are reported")
    every = [span for each in known for span in each]
    seconds = sum(end - begin for _, begin, end in known[0])
    joules = _sum(_joules(attempt, begin, end, gpu) for attempt, begin, end in every for gpu in range(attempt.gpus))
    tokens = _tokens(what, window)
    seen = [attempt.sample(place) for attempt, begin, end in every for place in _inside(attempt, begin, end)]
    throttled, reasons = _throttled(seen)
    few = sum(len(list(_inside(*span))) for span in known[0])
    held_back = [text for text in reasons if not text.startswith(POWER_CAP)]
    warnings = [f"the clocks of the GPUs were held back in the window: {', '.join(held_back)}"] if held_back else []
    warnings += [f"the window has only {count(few, 'sample')} of telemetry"] if few < FEW else []
    return found._replace(
        joules_per_token=joules / tokens if joules and tokens and gpus == what.gpus else None,
        gpu_power_w=joules / seconds / gpus if joules and seconds else None,
        sm_clock_mhz=_mean(each for sample in seen for each in sample["sm_clock_mhz"]),
        throttled=throttled,
        throttle_reasons=tuple(reasons),
        max_temperature_c=max(
            (each for sample in seen for each in sample["temperature_c"] if each is not None), default=None
        ),
        warnings=tuple(warnings),
        notes=notes,
    )


def _spans(node: Node, window: Timed) -> Spans:
    """The times of the window's steps on a node, those that follow each other joined; empty if one is not known."""
    spans: Spans = []
    for step in _counted(window):
        attempt = node.attempt_with(step)
        if attempt is None:
            return []
        begin, end = attempt.ends_s[step - 1], attempt.ends_s[step]
        if spans and spans[-1][0] is attempt and spans[-1][2] == begin:
            begin = spans.pop()[1]
        if end <= begin:
            return []
        spans.append((attempt, begin, end))
    return spans


def _counted(window: Timed) -> list[int]:
    """The steps whose time counts. Where not every step has a line, those between the lines count too."""
    if window.every == 1:
        return list(window.steps)
    return list(range(window.first or 0, (window.last or 0) + 1))


def _tokens(what: Identity, window: Timed) -> int | None:
    if not (what.global_batch_size and what.seq_length):
        return None
    return len(_counted(window)) * what.global_batch_size * what.seq_length


def _inside(attempt: Attempt, begin: float, end: float) -> Iterator[int]:
    """The places of the samples within a time."""
    return (place for place in attempt.around(begin, end) if begin <= attempt.times_s[place] <= end)


def _joules(attempt: Attempt, begin: float, end: float, gpu: int) -> float | None:
    """The energy of one GPU from one time to another; None if a sample is missing."""
    places = attempt.around(begin, end)
    times = [attempt.times_s[place] for place in places]
    if len(times) < 2 or any(after - before > LONGEST_GAP_S for before, after in pairwise(times)):
        return None
    counted = [attempt.sample(place)["energy_j"][gpu] for place in places]
    counter = [value for value in counted if value is not None]
    if len(counter) == len(times):
        if any(after < before for before, after in pairwise(counter)):
            return None  # the driver was loaded anew
        return _at(times, counter, end) - _at(times, counter, begin)
    power = [value for place in places if (value := attempt.sample(place)["power_w"][gpu]) is not None]
    return _integral(times, power, begin, end) if len(power) == len(times) else None


def _at(times: Sequence[float], values: Sequence[float], time_s: float) -> float:
    """The value at a time between two samples."""
    for (before, first), (after, second) in pairwise(zip(times, values, strict=True)):
        if before <= time_s <= after:
            return first + (second - first) * (time_s - before) / (after - before)
    raise ValueError(f"{time_s} is not between {times[0]} and {times[-1]}")


def _integral(times: Sequence[float], values: Sequence[float], begin: float, end: float) -> float:
    """The area below a line through the samples."""
    edges = [(begin, _at(times, values, begin)), (end, _at(times, values, end))]
    inside = [point for point in zip(times, values, strict=True) if begin < point[0] < end]
    points = [edges[0], *inside, edges[1]]
    return sum((after - before) * (first + second) / 2 for (before, first), (after, second) in pairwise(points))


def _throttled(seen: Sequence[Mapping[str, Sequence[float | None]]]) -> tuple[float | None, list[str]]:
    """The share of the samples in which a clock was held back, and each reason that is worth it with its own share."""
    bits = [int(each) for sample in seen for each in sample["throttle_reasons"] if each is not None]
    if not bits:
        return None, []
    counted = Counter(reason for each in bits for bit, reason in REASONS.items() if each & bit)
    shares = {reason: times / len(bits) for reason, times in counted.most_common() if times / len(bits) >= HELD_BACK}
    held = sum(any(each & bit for bit in REASONS) for each in bits)
    return held / len(bits), [f"{reason} {share:.0%}" for reason, share in shares.items()]


def _of_the_run(nodes: Sequence[Node], gpus: int | None) -> float | None:
    """kWh of all GPUs from the first to the last sample of each attempt; None if a GPU or a sample is missing."""
    if gpus is None or sum(max(each.gpus for each in node.attempts) for node in nodes) != gpus:
        return None
    attempts = [each for node in nodes for each in node.attempts if each.times_s]
    joules = _sum(_all_joules(each, gpu) for each in attempts for gpu in range(each.gpus))
    return None if joules is None else joules / JOULES_PER_KWH


def _all_joules(attempt: Attempt, gpu: int) -> float | None:
    """By the counter's first and last value, so that a long run is not read in full."""
    ends = [attempt.sample(place)["energy_j"][gpu] for place in (0, len(attempt.times_s) - 1)]
    if ends[0] is not None and ends[1] is not None:
        return ends[1] - ends[0] if ends[1] >= ends[0] else None
    return _joules(attempt, attempt.times_s[0], attempt.times_s[-1], gpu)


def _covered_s(nodes: Sequence[Node]) -> float | None:
    """The time from the first to the last sample of each attempt, on the node with the most."""
    times = [sum(each.times_s[-1] - each.times_s[0] for each in node.attempts if each.times_s) for node in nodes]
    return max(times, default=None)


def _cost(log: Log, window: Timed, time_s: float | None) -> dict[str, Any]:
    """The price of the GPUs for the run's time, and for a million tokens at the window's speed."""
    price, currency = get(log.plan or {}, ("price", "per_gpu_hour")), get(log.plan or {}, ("price", "currency"))
    what = log.identity
    if (
        isinstance(price, bool)
        or not isinstance(price, (int, float))
        or not 0 < price < MOST
        or not isinstance(currency, str)
    ):
        return {}
    per_second = price * what.gpus / SECONDS_PER_HOUR if what.gpus else None
    tokens = what.global_batch_size * what.seq_length if what.global_batch_size and what.seq_length else None
    return {
        "currency": currency,
        "cost": per_second * time_s if per_second and time_s else None,
        "cost_per_million_tokens": per_second * window.mean_s / tokens * MILLION
        if per_second and window.mean_s and tokens
        else None,
    }


def _sum(values: Iterator[float | None]) -> float | None:
    """The sum; None if a value is missing."""
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
