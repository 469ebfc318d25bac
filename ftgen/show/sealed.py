"""Sealed runs and the differences of two runs, as text. In: a `Sealed`, differences. Out: lines."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftgen.results.differences import Difference
from ftgen.results.sealed import Sealed
from ftgen.units import UNKNOWN, clean, ratio, significant

LONGEST = 60  # characters of a value


def contents(sealed: Sealed) -> str:
    """What a sealed run has in it."""
    run, files = sealed.manifest.run, sealed.manifest.files
    size = sum(file.bytes for file in files.values())
    kinds = {
        "plan": "run/plan.json",
        "environment": "run/environment.json",
        "node check": "run/nodes/",
        "telemetry": "run/telemetry",
    }
    missing = [kind for kind, start in kinds.items() if not any(name.startswith(start) for name in files)]
    lacks = f"; the run has no {', '.join(missing)}" if missing else ""
    return clean(f"{run.experiment}, run {run.run_id or UNKNOWN}: {len(files)} files, {size} bytes{lacks}")


def unlike(sealed: Mapping[str, Any], again: Mapping[str, Any]) -> list[Difference]:
    """The results that the logs inside do not give. A key that the sealing ftgen did not know is none."""
    return [Difference(key, value, again.get(key)) for key, value in sealed.items() if again.get(key) != value]


def difference_lines(found: Mapping[str, Sequence[Difference]], names: tuple[str, str]) -> Iterator[str]:
    """Each part with its differences."""
    yield clean(f"{names[0]} -> {names[1]}")
    for part, differences in found.items():
        yield f"{part}:" if differences else f"{part}: no difference"
        yield from (f"  {line}" for line in map(one_line, differences))


def one_line(difference: Difference) -> str:
    """`step_time_s: 0.5566 -> 0.8168 (1.467x)`."""
    first, second = difference.first, difference.second
    line = f"{difference.key}: {_text(first)} -> {_text(second)}"
    both = all(isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 for value in (first, second))
    return clean(f"{line} ({ratio(second / first)})" if both else line)


def _text(value: Any) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, float):
        return significant(value, 6)
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = text or "none"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
