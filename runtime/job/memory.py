"""Tell how much memory this process can still use.

In: /proc and the control groups of this process. Out: bytes.

A Slurm job or a container can have less than the machine. Its limit is in a control group, of version 1 or 2. Cached
files count as used there; the kernel frees those of the list `inactive_file` first, so they are free here.
"""

from collections.abc import Iterator
from pathlib import Path

# By version: the folder of all groups, the files of limit and use, and the key of cached files in memory.stat.
VERSION_1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def available(root: Path = Path("/")) -> int:
    """Bytes that are free on the machine, or below the lowest limit. 0 if the system does not report it."""
    lines = _text(root / "proc/meminfo").splitlines()
    machine = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return max(0, min([*machine, *_below_limits(root)], default=0))


def _below_limits(root: Path) -> Iterator[int]:
    """What each limit of this process's groups, and of the groups around them, leaves."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, limit, used, cached = VERSION_1 if controllers else VERSION_2
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            own = root / top / folder
            if _text(own / limit).isdigit() and _text(own / used).isdigit():
                yield int(_text(own / limit)) - int(_text(own / used)) + _stat(own, cached)


def _stat(folder: Path, key: str) -> int:
    lines = (line.split() for line in _text(folder / "memory.stat").splitlines())
    return next((int(words[1]) for words in lines if words[:1] == [key]), 0)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
