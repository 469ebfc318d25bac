"""Where runs are. In: directories. Out: the `Folder`s with logs below them, and a `Run` for each run in those.

Runs are told by the names of their files alone: no file is opened."""

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ftgen.errors import LogError, Problem
from ftgen.logs import identity

# log-<account>.<experiment>_<id>_<restart>.out; NeMo-Run writes log-<account>-<partition>.<experiment>_…
LOG_NAME = re.compile(r"log-(?P<stem>.*)_(?P<id>\d{1,18})_(?P<restart>\d{1,9})\.out(?:\.gz|\.zst)?", re.DOTALL)
PLAN = "plan.json"

Tell = Callable[[str], object]  # what is called with each thing that was passed over, and why


class Run(NamedTuple):
    """One run, as its files' names tell it."""

    experiment: str
    run_id: str
    log: str  # path of the newest restart's
    restart: int
    earlier: int  # logs of restarts before it, which do not count
    plan: Path | None
    batch: Path | None = None  # the batch script's own log, beside
    size: int = 0  # bytes of the log


class Folder(NamedTuple):
    """A directory with logs in it. Paths are strings here: the others cost more than all the rest."""

    path: str
    logs: dict[str, int]  # bytes, by name
    others: list[str]  # names of what may belong to them

    @property
    def size(self) -> int:
        """Bytes of all the logs."""
        return sum(self.logs.values())


def find_runs(paths: Iterable[str | Path], tell: Tell = lambda _: None) -> list[Run]:
    """Every run below the directories (or of the log files) in `paths`, by experiment and id.

    Links to directories are followed in `paths` only. LogError: a path that is not there, or no run at all.
    """
    return sorted((run for folder in find_folders(paths, tell) for run in runs_in(folder)), key=order)


def order(run: Run) -> tuple[str, int, str, str]:
    """By experiment and id, ids as numbers."""
    return run.experiment, len(run.run_id), run.run_id, run.log


def find_folders(paths: Iterable[str | Path], tell: Tell = lambda _: None) -> Iterator[Folder]:
    """The directories that the runs are in, as they are found; each log once. LogError as `find_runs`."""
    tops = [os.fspath(Path(path)) for path in paths]
    missing = [Problem((), f"there is no {top}") for top in tops if not os.path.lexists(top)]
    if missing:
        raise LogError(*missing)
    seen: set[tuple[int, int]] = set()
    none = True
    for path, names, others in _folders(tops, tell):
        within = _within(path)
        logs = {name: size for name in names if (size := _size(within + name, seen, tell)) is not None}
        if logs:
            none = False
            yield Folder(path, logs, others)
    if none:
        where = ", ".join(tops) or "no directory"
        what = f"no run found below {where}: no file is named log-<account>.<experiment>_<id>_<restart>.out"
        raise LogError(Problem((), what, "runs keep their logs in $STAGE_PATH/logs"))


def runs_in(folder: Folder) -> Iterator[Run]:
    """The runs of one directory; the highest restart of each is its log."""
    restarts: dict[tuple[str, str], list[tuple[int, str, int]]] = {}
    for name, size in folder.logs.items():
        match = LOG_NAME.fullmatch(name)
        stem, run_id, restart = match.group("stem", "id", "restart") if match else (Path(name).stem, "", "0")
        restarts.setdefault((stem, run_id), []).append((int(restart), name, size))
    place = _within(folder.path)
    # where logs of several runs were put together, a plan beside them is that of one at most
    plan = Path(place + PLAN) if PLAN in folder.others and len(restarts) == 1 else None
    for (stem, run_id), found in restarts.items():
        restart, name, size = max(found)
        beside = [name for name in folder.others if run_id and name.endswith(f"_{run_id}.out")]
        batch = Path(place + min(beside)) if beside else None
        yield Run(_experiment(folder.path, stem), run_id, place + name, restart, len(found) - 1, plan, batch, size)


def _folders(tops: list[str], tell: Tell) -> Iterator[tuple[str, list[str], list[str]]]:
    """Directories, with the names of the logs there, and of what may belong to them."""
    asked: dict[str, list[str]] = {}
    for top in tops:
        if os.path.isdir(top):  # noqa: PTH112
            yield from _below(top, tell)
        else:
            path, name = os.path.split(top)
            names = asked.setdefault(path, [])
            names += [name] if name not in names else []
    for path, logs in asked.items():  # these count whatever they are called
        yield path, logs, [PLAN] if Path(path, PLAN).is_file() else []


def _below(top: str, tell: Tell) -> Iterator[tuple[str, list[str], list[str]]]:
    """The directories with logs in and below one."""
    for path, folders, files in os.walk(top, onerror=lambda error: tell(_unreadable(error))):
        folders.sort()
        logs = [name for name in files if LOG_NAME.fullmatch(name)]
        if logs:
            yield path, logs, [name for name in files if name == PLAN or name.startswith("sbatch_")]


def _within(path: str) -> str:
    """What stands before the names in a directory; os.path.join takes four times as long."""
    return "" if path in {"", "."} else path if path[-1] == os.sep else path + os.sep


def _unreadable(error: OSError) -> str:
    return f"{error.filename}: cannot be read: {error.strerror}: runs in it are not counted"


def _size(path: str, seen: set[tuple[int, int]], tell: Tell) -> int | None:
    """The file's size in bytes; None if it is not a file, or was reached before."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError as error:  # a link to nowhere, or gone by now
        tell(f"{path}: passed over: {error.strerror}")
        return None
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        tell(f"{path}: passed over: it is not a file")
        return None
    place = (status.st_dev, status.st_ino)
    if place in seen:
        return None
    seen.add(place)
    return status.st_size


def _experiment(folder: str, stem: str) -> str:
    """The directory's name where the file's ends with it, as the layout has it; else what looks like an experiment."""
    directory = folder.rpartition(os.sep)[2]
    if directory and (stem == directory or stem.endswith(f".{directory}")):
        return directory
    for name in (stem, *reversed(Path(folder).parts)):
        if match := identity.RECIPE_NAME.search(name):
            return match.group()
    return stem.partition(".")[2] or stem
