"""Where runs are. In: directories. Out: a `Run` for each run below them, as the names of its files tell it."""

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ftgen import identity
from ftgen.errors import LogError, Problem

# log-<account>.<experiment>_<id>_<restart>.out; NeMo-Run writes log-<account>-<partition>.<experiment>_…
LOG_NAME = re.compile(r"log-(?P<stem>.*)_(?P<id>\d{1,18})_(?P<restart>\d{1,9})\.out(?:\.gz|\.zst)?", re.DOTALL)
PLAN = "plan.json"

Tell = Callable[[str], object]  # what is called with each thing that was passed over, and why


class Run(NamedTuple):
    """One run, as its files' names tell it."""

    experiment: str
    run_id: str
    log: Path  # the newest restart's
    restart: int
    earlier: int  # logs of restarts before it, which do not count
    plan: Path | None
    batch: Path | None = None  # the batch script's own log, beside
    size: int = 0  # bytes of the log


def find_runs(paths: Iterable[str | Path], tell: Tell = lambda _: None) -> list[Run]:
    """Every run below the directories (or of the log files) in `paths`, by experiment and id.

    Links to directories are followed in `paths` only. LogError: a path that is not there, or no run at all.
    """
    tops = [os.fspath(path) for path in paths]
    missing = [Problem((), f"there is no {top}") for top in tops if not os.path.lexists(top)]
    if missing:
        raise LogError(*missing)
    seen: set[tuple[int, int]] = set()
    runs = [run for folder in _folders(tops, tell) for run in _runs(folder, seen, tell)]
    if not runs:
        where = ", ".join(tops) or "no directory"
        what = f"no run found below {where}: no file is named log-<account>.<experiment>_<id>_<restart>.out"
        raise LogError(Problem((), what, "runs keep their logs in $STAGE_PATH/logs"))
    return sorted(runs, key=lambda run: (run.experiment, len(run.run_id), run.run_id, os.fspath(run.log)))


class Folder(NamedTuple):
    """A directory with logs in it. Paths are strings here: the others cost more than all the rest."""

    path: str
    logs: dict[str, re.Match[str] | None]  # by name; what it tells, if it is named like a log
    others: list[str]


def _folders(tops: list[str], tell: Tell) -> Iterator[Folder]:
    asked: dict[str, dict[str, re.Match[str] | None]] = {}
    for top in tops:
        if os.path.isdir(top):  # noqa: PTH112
            yield from _below(top, tell)
        else:
            path, name = os.path.split(top)
            asked.setdefault(path, {})[name] = LOG_NAME.fullmatch(name)
    for path, logs in asked.items():  # these count whatever they are called
        yield Folder(path, logs, [PLAN] if Path(path, PLAN).is_file() else [])


def _below(top: str, tell: Tell) -> Iterator[Folder]:
    """The directories with logs in and below one. Half the time that os.walk takes: it asks less of other files."""
    ahead = [top]
    while ahead:
        path = ahead.pop()
        inside, others = [], []
        logs: dict[str, re.Match[str] | None] = {}
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    name = entry.name
                    if entry.is_dir(follow_symlinks=False):
                        inside.append(name)
                    elif entry.is_symlink() and os.path.isdir(entry.path):  # noqa: PTH112
                        continue
                    elif name.startswith("log-") and (match := LOG_NAME.fullmatch(name)):
                        logs[name] = match
                    elif name == PLAN or name.startswith("sbatch_"):
                        others.append(name)
        except OSError as error:
            tell(_unreadable(error))
            continue
        if logs:
            yield Folder(path, logs, others)
        ahead += [os.path.join(path, name) for name in sorted(inside, reverse=True)]  # noqa: PTH118


def _unreadable(error: OSError) -> str:
    return f"{error.filename}: cannot be read: {error.strerror}: runs in it are not counted"


def _runs(folder: Folder, seen: set[tuple[int, int]], tell: Tell) -> Iterator[Run]:
    """The runs of one directory; the highest restart of each is its log."""
    restarts: dict[tuple[str, str], list[tuple[int, str, int]]] = {}
    for name, match in folder.logs.items():
        size = _size(os.path.join(folder.path, name), seen, tell)  # noqa: PTH118
        if size is not None:
            stem, run_id, restart = match.group("stem", "id", "restart") if match else (Path(name).stem, "", "0")
            restarts.setdefault((stem, run_id), []).append((int(restart), name, size))
    place = Path(folder.path)
    # where logs of several runs were put together, a plan beside them is that of one at most
    plan = place / PLAN if PLAN in folder.others and len(restarts) == 1 else None
    for (stem, run_id), found in restarts.items():
        restart, name, size = max(found)
        beside = [name for name in folder.others if run_id and name.endswith(f"_{run_id}.out")]
        batch = place / min(beside) if beside else None
        yield Run(_experiment(folder.path, stem), run_id, place / name, restart, len(found) - 1, plan, batch, size)


def _size(path: str, seen: set[tuple[int, int]], tell: Tell) -> int | None:
    """The file's size in bytes; None if it is no file, or was reached before."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError as error:  # a link to nowhere, or gone by now
        tell(f"{path}: passed over: {error.strerror}")
        return None
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        tell(f"{path}: passed over: it is no file")
        return None
    if (status.st_dev, status.st_ino) in seen:
        return None
    seen.add((status.st_dev, status.st_ino))
    return status.st_size


def _experiment(folder: str, stem: str) -> str:
    """The directory's name where the file's ends with it, as the layout has it; else what looks like an experiment."""
    directory = os.path.basename(folder)  # noqa: PTH119
    if directory and (stem == directory or stem.endswith(f".{directory}")):
        return directory
    for name in (stem, *reversed(Path(folder).parts)):
        if match := identity.RECIPE_NAME.search(name):
            return match.group()
    return stem.partition(".")[2] or stem
