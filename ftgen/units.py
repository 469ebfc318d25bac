"""Parses and formats quantities: walltimes, bytes, FLOP/s. In: texts or numbers. Out: numbers or texts."""

import math
import re

UNKNOWN = "–"  # stands for a missing measurement

WALLTIME = r"^(?:([0-9]{1,4})-)?([0-9]{1,6}):([0-5][0-9]):([0-5][0-9])$"


def parse_walltime(text: str) -> int:
    """Seconds in Slurm's `[days-]hours:minutes:seconds`. ValueError for any other text and for 0 seconds."""
    match = re.fullmatch(WALLTIME, text)
    if not match:
        raise ValueError(f"must be [days-]hours:minutes:seconds, found {text!r}")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise ValueError("must be longer than 0 seconds")
    return total


def format_walltime(seconds: int) -> str:
    """Slurm's `hours:minutes:seconds`, or `days-hours:minutes:seconds` from one day on."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02}:{minute:02}:{second:02}"
    return f"{days}-{clock}" if days else clock


def format_flops(flops: float | None) -> str:
    """FLOP/s, in TFLOP/s."""
    return UNKNOWN if flops is None else f"{flops / 1e12:g} TFLOP/s"


def format_bytes(count: float) -> str:
    """Bytes in the binary unit that gives one to four digits before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def number(value: float | None, decimals: int) -> str:
    """Rounded to `decimals`, without trailing zeros: 1.32, 0.924, 116."""
    if value is None:
        return UNKNOWN
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def significant(value: float | None, digits: int) -> str:
    """Rounded to `digits` significant digits; digits before the point are never rounded away."""
    if not value or not math.isfinite(value):
        return UNKNOWN if value is None else f"{value:g}"
    return number(value, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


def whole(value: float | None) -> str:
    """Rounded down to a whole number, as in the recipe."""
    return UNKNOWN if value is None else str(math.floor(round(value, 6)))


def percent(value: float | None, decimals: int) -> str:
    """A fraction as a percentage."""
    return UNKNOWN if value is None else f"{number(100 * value, decimals)}%"


def ratio(value: float | None) -> str:
    """A ratio: 0.956x."""
    return UNKNOWN if value is None else f"{value:.3f}x"


def clean(text: str) -> str:
    """The text with non-printing characters spelled out: control characters, bidirectional marks, lone surrogates."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text)
