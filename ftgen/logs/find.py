"""Where runs are. In: directories and files. Out: a `Run` for each run there.

A file is a log by its name, as the recipe and NeMo-Run name logs; by being asked for; or because step lines are in it,
which a look at its beginning and its end shows.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ftgen.errors import LogError, Problem
from ftgen.logs import identity
from ftgen.logs.look import Look, look_at

# log-<account>.<experiment>_<id>_<restart>.out; NeMo-Run writes log-<account>-<partition>.<experiment>_…
LOG_NAME = re.compile(r"log-(?P<stem>.*)_(?P<id>\d{1,18})_(?P<restart>\d{1,9})\.out(?:\.gz|\.zst)?", re.DOTALL)
JOB_ID = re.compile(r"(?P<name>.*?)[-_.](?P<id>\d{2,18}(?:_\d{1,9})?)")  # slurm-1234, llama3-8b_joe_124, an array's 77_3
PLAN = "plan.json"
# Files that are no logs, by their names: what is written beside logs, and what takes long to look at.
NO_LOGS = re.compile(
    r"\..*|sbatch_.*|submit-.*|convert-.*|.*\.(?:err|json|jsonl|toml|ya?ml|py|sh|html?|md|csv|tex|png|svg|npy|npz|pt|bin|idx|"
    r"safetensors|distcp|nemo|model|sqsh|sif|whl|nsys-rep|sqlite)",
    re.DOTALL,
)

Tell = Callable[[str], object]  # what is called with each thing that was passed over, and why


class Run(NamedTuple):
    """One run, as its files' names tell it."""

    experiment: str
    run_id: str
    log: str  # path of the newest restart's
    restart: int
    earlier: tuple[str, ...]  # logs of the restarts before it, oldest first
    plan: Path | None
    beside: tuple[Path, ...] = ()  # the batch script's own log, and what was written to stderr
    size: int = 0  # bytes of all its logs


def find_runs(paths: Iterable[str | Path], tell: Tell = lambda _: None) -> list[Run]:
    """Every run below the directories (or of the log files) in `paths`, by experiment and id.

    Links to directories are followed in `paths` only. LogError: a path that is not there, or no run at all.
    """
    return sorted(runs_below(paths, tell), key=order)


def order(run: Run) -> tuple[str, int, str, str]:
    """By experiment and id, ids as numbers."""
    return run.experiment, len(run.run_id), run.run_id, run.log


def runs_below(paths: Iterable[str | Path], tell: Tell = lambda _: None) -> Iterator[Run]:
    """The runs as they are found; each log once. LogError as `find_runs`."""
    tops = [os.fspath(Path(path)) for path in paths]
    if missing := [Problem((), f"there is no {top}") for top in tops if not os.path.lexists(top)]:
        raise LogError(*missing)
    seen: set[tuple[int, int]] = set()
    none, left_out = True, 0
    for path, names, others, texts in _folders(tops, tell):
        left_out += texts
        within = _within(path)
        logs = {name: size for name in names if (size := _size(within + name, seen, tell)) is not None}
        none = none and not logs
        yield from _runs_in(path, logs, others)
    looked = f"{left_out} other file{'' if left_out == 1 else 's'} without step lines"
    if none:
        what = f"no run found below {', '.join(tops) or 'no directory'}"
        what += ": no file has step lines or the name log-<account>.<experiment>_<id>_<restart>.out"
        what += f" ({looked})" if left_out else ""
        raise LogError(Problem((), what, "runs keep their logs in $STAGE_PATH/logs"))
    if left_out:
        tell(f"left out: {looked}")


def _runs_in(folder: str, logs: dict[str, int], others: list[str]) -> Iterator[Run]:
    """The runs of one directory; the highest restart of each is its log. A compressed copy of a log is left out."""
    restarts: dict[tuple[str, str], dict[int, str]] = {}
    for name in sorted(logs):
        match = LOG_NAME.fullmatch(name)
        if match:
            key, restart = (match["stem"], match["id"]), int(match["restart"])
        else:
            key, restart = (name.removesuffix(".gz").removesuffix(".zst"), ""), 0
        restarts.setdefault(key, {}).setdefault(restart, name)
    place = _within(folder)
    # if several runs' logs are in one directory, a plan beside them belongs to one of them at most
    plan = Path(place + PLAN) if PLAN in others and len(restarts) == 1 else None
    for (stem, run_id), found in restarts.items():
        *before, newest = sorted(found)
        name = found[newest]
        earlier = tuple(place + found[restart] for restart in before)
        experiment, number = (_experiment(folder, stem), run_id) if run_id else _by_path(folder, stem)
        array = stem.rpartition(f"{experiment}_")[2]
        number = f"{array}_{number}" if run_id and array != stem and array.isdecimal() else number
        beside = tuple(Path(place + other) for other in others if _belongs(other, name, number))
        size = sum(logs[each] for each in found.values())
        yield Run(experiment, number, place + name, newest, earlier, plan, beside, size)


def _belongs(other: str, log: str, run_id: str) -> bool:
    """Whether another file is of the same run: the batch script's log, or what was written to stderr."""
    stem = log.partition(".out")[0] if ".out" in log else Path(log).stem
    of_stderr = {f"{stem}.err", stem.replace("stdout", "stderr") + ".log", stem.replace("stdout", "stderr") + ".txt"}
    return other not in {PLAN, log} and (bool(run_id and other.endswith(f"_{run_id}.out")) or other in of_stderr)


Found = tuple[str, list[str], list[str], int]  # a directory, names of logs and of what may belong to them, texts left out


def _folders(tops: list[str], tell: Tell) -> Iterator[Found]:
    asked: dict[str, list[str]] = {}
    for top in tops:
        if os.path.isdir(top):  # noqa: PTH112
            yield from _below(top, tell)
        else:
            path, name = os.path.split(top)
            asked.setdefault(path, []).append(name)
    for path, logs in asked.items():  # these count whatever they are called
        looks = ((name, look_at(_within(path) + name)) for name in logs)
        if wrong := [Problem((), f"{_within(path)}{name} is {look.value}", look.hint) for name, look in looks if look.hint]:
            raise LogError(*wrong)
        beside = sorted(os.listdir(path or "."))  # noqa: PTH208
        yield path, logs, [name for name in beside if name not in logs and _may_belong(name)], 0


def _below(top: str, tell: Tell) -> Iterator[Found]:
    """The directories in and below one."""
    for path, folders, files in os.walk(top, onerror=lambda error: tell(_unreadable(error))):
        folders.sort()
        within = _within(path)
        logs, others, texts = [], [name for name in files if _may_belong(name)], 0
        for name in files:
            if LOG_NAME.fullmatch(name):
                logs.append(name)
            elif not (_may_belong(name) or NO_LOGS.fullmatch(name)):
                look = look_at(within + name)
                logs += [name] if look is Look.LOG else []
                texts += look is Look.TEXT
                if look.hint:
                    tell(f"{within}{name} is {look.value} and is left out: {look.hint}")
        if not logs:  # then the batch script's own log may be the run's
            logs = [name for name in others if name.startswith("sbatch_") and look_at(within + name) is Look.LOG]
        yield path, logs, others, texts


def _may_belong(name: str) -> bool:
    return name == PLAN or name.startswith(("sbatch_", "stderr")) or name.endswith(".err")


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
    alone = re.sub(r"_\d+$", "", stem)  # an array's index stands behind the name
    if directory and any(f".{name}".endswith(f".{directory}") for name in (stem, alone)):
        return directory
    return _named((stem, *reversed(Path(folder).parts))) or stem.partition(".")[2] or stem


def _named(names: Iterable[str]) -> str:
    """The first name that looks like an experiment's."""
    for name in names:
        for pattern in (identity.RECIPE_NAME, identity.LONG_NAME):
            if match := pattern.search(name):
                return match.group()
    return ""


def _by_path(folder: str, name: str) -> tuple[str, str]:
    """Experiment and job id of a log with a name of its own: `slurm-llama-1234.out`, `a/stdout.txt`."""
    stem = name if name.startswith(".") else name.rpartition(".")[0] or name
    job = JOB_ID.fullmatch(stem)
    base, run_id = (job["name"], job["id"]) if job else (stem, "")
    named = _named((stem, *reversed(Path(folder).parts)))
    if named:
        return named, run_id
    if not identity.is_name(base) and not run_id:  # every run's log has this name: the path tells which it is
        return "/".join((*Path(folder).parts[-2:], stem)).lstrip("/"), run_id
    return base, run_id
