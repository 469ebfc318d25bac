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
from ftgen.logs.look import HINTS, LOG, TEXT, look_at

# log-<account>.<experiment>_<id>_<restart>.out; NeMo-Run writes log-<account>-<partition>.<experiment>_…
LOG_NAME = re.compile(r"log-(?P<stem>.*)_(?P<id>\d{1,18})_(?P<restart>\d{1,9})\.out(?:\.gz|\.zst)?", re.DOTALL)
JOB_ID = re.compile(r"(?P<name>.*?)[-_.](?P<id>\d{2,18}(?:_\d{1,9})?)")  # slurm-1234, llama3-8b_joe_124, an array's 77_3
PLAN = "plan.json"
TELEMETRY = re.compile(r"telemetry\..+\.jsonl", re.DOTALL)  # of a node, as runtime/node/telemetry.py names it
# Files that are no logs, by their names: what is written beside logs, and what takes long to look at.
NO_LOGS = re.compile(
    r"\..*|sbatch_.*|submit-.*|convert-.*|.*\.(?:err|json|jsonl|toml|ya?ml|py|sh|html?|md|csv|tex|png|svg|npy|npz|pt|bin|idx|"
    r"safetensors|distcp|nemo|model|sqsh|sif|whl|nsys-rep|sqlite)",
    re.DOTALL,
)

# Files that may belong to a log beside them.
BESIDE = re.compile(rf"plan\.json|sbatch_.*|stderr.*|.*\.err|{TELEMETRY.pattern}", re.DOTALL)

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
    telemetry: tuple[Path, ...] = ()  # power and clocks, a file of each node


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
    for folder, names, others, texts in _folders(tops, tell):
        left_out += texts
        logs = {name: size for name in names if (size := _size(_join(folder, name), seen, tell)) is not None}
        none = none and not logs
        yield from _runs_in(folder, logs, others)
    looked = f"{left_out} other file{'' if left_out == 1 else 's'} without step lines"
    if none:
        what = f"no run found below {', '.join(tops) or 'no directory'}"
        what += ": no file has step lines or the name log-<account>.<experiment>_<id>_<restart>.out"
        what += f" ({looked})" if left_out else ""
        raise LogError(Problem((), what, "runs keep their logs in $STAGE_PATH/logs"))
    if left_out:
        tell(f"left out: {looked}")


Found = tuple[str, list[str], list[str], int]  # a directory, names of logs and of what may belong to them, texts left out


def _folders(tops: list[str], tell: Tell) -> Iterator[Found]:
    asked: dict[str, list[str]] = {}
    for top in tops:
        if os.path.isdir(top):  # noqa: PTH112
            yield from _below(top, tell)
        else:
            folder, name = os.path.split(top)
            asked.setdefault(folder, []).append(name)
    for folder, logs in asked.items():  # these count whatever they are called
        looks = {_join(folder, name): look_at(_join(folder, name)) for name in logs}
        if wrong := [Problem((), f"{path} is {look}", HINTS[look]) for path, look in looks.items() if look in HINTS]:
            raise LogError(*wrong)
        beside = sorted(os.listdir(folder or "."))  # noqa: PTH208
        yield folder, logs, [name for name in beside if name not in logs and BESIDE.fullmatch(name)], 0


def _below(top: str, tell: Tell) -> Iterator[Found]:
    """The directories in and below one."""
    for folder, folders, files in os.walk(top, onerror=lambda error: tell(_unreadable(error))):
        folders.sort()
        others = [name for name in files if BESIDE.fullmatch(name)]
        looks = dict.fromkeys(filter(LOG_NAME.fullmatch, files), LOG)
        unknown = (name for name in files if not (name in looks or BESIDE.fullmatch(name) or NO_LOGS.fullmatch(name)))
        looks |= {name: look_at(_join(folder, name)) for name in unknown}
        for name, look in looks.items():
            if look in HINTS:
                tell(f"{_join(folder, name)} is {look} and is left out: {HINTS[look]}")
        logs = [name for name, look in looks.items() if look == LOG]
        if not logs:  # then the batch script's own log may be the run's
            logs = [name for name in others if name.startswith("sbatch_") and look_at(_join(folder, name)) == LOG]
        yield folder, logs, others, list(looks.values()).count(TEXT)


def _unreadable(error: OSError) -> str:
    return f"{error.filename}: cannot be read: {error.strerror}: runs in it are not counted"


def _join(folder: str, name: str) -> str:
    return os.path.join("" if folder == "." else folder, name)  # noqa: PTH118


def _size(path: str, seen: set[tuple[int, int]], tell: Tell) -> int | None:
    """The file's size in bytes; None if it is not a file, or was reached before."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError as error:  # a link to nowhere, or gone by now
        tell(f"{path}: passed over: {error.strerror}")
        return None
    place = (status.st_dev, status.st_ino)
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        tell(f"{path}: passed over: it is not a file")
    elif place not in seen:
        seen.add(place)
        return status.st_size
    return None


def _runs_in(folder: str, logs: dict[str, int], others: list[str]) -> Iterator[Run]:
    """The runs of one directory; the highest restart of each is its log. A compressed copy of a log is left out."""
    restarts: dict[tuple[str, str], dict[int, str]] = {}
    for name in sorted(logs):
        match = LOG_NAME.fullmatch(name)
        key = (match["stem"], match["id"]) if match else (name.removesuffix(".gz").removesuffix(".zst"), "")
        restarts.setdefault(key, {}).setdefault(int(match["restart"]) if match else 0, name)
    # if several runs' logs are in one directory, a plan beside them belongs to one of them at most
    plan = Path(_join(folder, PLAN)) if PLAN in others and len(restarts) == 1 else None
    for (stem, run_id), found in restarts.items():
        *earlier, (restart, name) = sorted(found.items())
        experiment, number = _names(folder, stem, run_id) if run_id else _names_by_path(folder, stem)
        yield Run(
            experiment,
            number,
            _join(folder, name),
            restart,
            tuple(_join(folder, before) for _, before in earlier),
            plan,
            tuple(Path(_join(folder, other)) for other in others if _belongs(other, name, number)),
            sum(logs[each] for each in found.values()),
            tuple(Path(_join(folder, other)) for other in sorted(others) if plan and TELEMETRY.fullmatch(other)),
        )


def _belongs(other: str, log: str, run_id: str) -> bool:
    """Whether another file is of the same run: the batch script's log, or what was written to stderr."""
    stem = log.partition(".out")[0] if ".out" in log else Path(log).stem
    stderr = stem.replace("stdout", "stderr")
    of_run = bool(run_id) and other.endswith(f"_{run_id}.out")
    return other not in {PLAN, log} and (of_run or other in {f"{stem}.err", f"{stderr}.log", f"{stderr}.txt"})


def _names(folder: str, stem: str, run_id: str) -> tuple[str, str]:
    """Experiment and job id of a log as the recipe names it; behind the experiment may stand an array's index.

    The experiment is the directory's name where the file's ends with it, else what looks like an experiment.
    """
    directory = folder.rpartition(os.sep)[2]
    alone = re.sub(r"_\d+$", "", stem)
    of_directory = directory and any(f".{name}".endswith(f".{directory}") for name in (stem, alone))
    experiment = directory if of_directory else _named(folder, stem) or stem.partition(".")[2] or stem
    array = stem.rpartition(f"{experiment}_")[2]
    return experiment, f"{array}_{run_id}" if array != stem and array.isdecimal() else run_id


def _names_by_path(folder: str, name: str) -> tuple[str, str]:
    """Experiment and job id of a log with a name of its own: `slurm-llama-1234.out`, `a/stdout.txt`."""
    stem = name if name.startswith(".") else name.rpartition(".")[0] or name
    job = JOB_ID.fullmatch(stem)
    base, run_id = (job["name"], job["id"]) if job else (stem, "")
    if not (named := _named(folder, stem)) and not identity.is_name(base) and not run_id:
        return "/".join((*Path(folder).parts[-2:], stem)).lstrip("/"), run_id  # every run's log has this name
    return named or base, run_id


def _named(folder: str, stem: str) -> str:
    """The first that looks like an experiment's name: in the file's name, or the directory nearest to it."""
    patterns = (identity.RECIPE_NAME, identity.LONG_NAME)
    found = (pattern.search(name) for name in (stem, *reversed(Path(folder).parts)) for pattern in patterns)
    return next((match.group() for match in found if match), "")
