"""Telemetry made up for a run of the tests: samples of known power, so that the energy between two times is known."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

BEGIN_S = 1_795_000_000.0  # when the first step begins
POWER_CAP, THERMAL, IDLE = 0x4, 0x20, 0x1


def lines(
    ends: dict[int, float],
    *,
    node: str = "node1",
    gpus: int = 2,
    power: Callable[[float, int], float] = lambda _time, _gpu: 600.0,
    energy: Callable[[float, int], float] | None = None,
    times: Iterable[float] | None = None,
    reasons: Callable[[float], int] = lambda _time: POWER_CAP,
) -> list[str]:
    """A head, a sample a second from 5 s before the first end of a step to 5 s after the last one, and the ends.

    Times are seconds after BEGIN_S. `energy` is the counter in joules; None: the GPU has none.
    """
    first, last = min(ends.values()), max(ends.values())
    times = times if times is not None else (first - 5 + second + 0.37 for second in range(int(last - first) + 11))
    head = {"format": 1, "node": node, "interval_s": 1.0, "gpus": [{"index": str(gpu), "name": "X"} for gpu in range(gpus)]}
    found = [json.dumps(head)]
    marks = sorted((time, step) for step, time in ends.items())
    for time in times:
        while marks and marks[0][0] <= time:
            found.append(_mark(*marks.pop(0)))
        sample = {
            "time_s": round(BEGIN_S + time, 3),
            "power_w": [power(time, gpu) for gpu in range(gpus)],
            "energy_j": [energy(time, gpu) if energy else None for gpu in range(gpus)],
            "sm_clock_mhz": [1700 + 100 * gpu for gpu in range(gpus)],
            "memory_clock_mhz": [2619] * gpus,
            "throttle_reasons": [reasons(time)] * gpus,
            "temperature_c": [60 + gpu for gpu in range(gpus)],
            "memory_used_gib": [29.0] * gpus,
        }
        found.append(json.dumps(sample, separators=(",", ":")))
    return [*found, *(_mark(*mark) for mark in marks)]


def _mark(time: float, step: int) -> str:
    return json.dumps({"step": step, "time_s": round(BEGIN_S + time, 3)}, separators=(",", ":"))


def write(folder: Path, text: Iterable[str], node: str = "node1") -> Path:
    """The file beside a log."""
    path = folder / f"telemetry.{node}.jsonl"
    path.write_text("".join(f"{line}\n" for line in text))
    return path
