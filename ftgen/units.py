"""Quantities as people write them: walltimes, bytes, FLOP/s. Text in, numbers out, and back."""

import re

_WALLTIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")


def parse_walltime(text: str) -> int:
    """Seconds in Slurm's `[days-]hours:minutes:seconds`; ValueError for anything else, and for no time at all."""
    match = _WALLTIME.fullmatch(text)
    if not match:
        raise ValueError(f"must be [days-]hours:minutes:seconds, found {text!r}")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise ValueError("must be longer than no time at all")
    return total


def format_walltime(seconds: int) -> str:
    """Slurm's `hours:minutes:seconds`, with days before it where there are any."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02}:{minute:02}:{second:02}"
    return f"{days}-{clock}" if days else clock


def format_flops(flops: float | None) -> str:
    """FLOP/s in TFLOP/s."""
    return "–" if flops is None else f"{flops / 1e12:g} TFLOP/s"


def format_bytes(count: float) -> str:
    """Bytes in the binary unit that leaves one to four digits before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
