"""Logs. In: directories. Out: a `Run` for each run below them, and the `Log` that its newest restart left.

`find_runs` only looks at names; `read_log` reads one file, as bytes, a block at a time, and decodes what it keeps.
So the runs of a whole cluster can be listed at once, and read one after the other, or in parallel.
"""

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from ftgen import identity
from ftgen.chunk import Chunk
from ftgen.endings import Ending, endings
from ftgen.errors import LogError, Problem
from ftgen.log_file import Block, LogFileError, block_at, blocks
from ftgen.log_lines import Item, Log, scan

# log-<account>.<experiment>_<id>_<restart>.out; NeMo-Run writes log-<account>-<partition>.<experiment>_…
LOG_NAME = re.compile(r"log-(?P<stem>.*)_(?P<id>\d{1,18})_(?P<restart>\d{1,9})\.out(?:\.gz|\.zst)?", re.DOTALL)

CLOCK = re.compile(rb"20\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d")
CLOCK_BYTES = 4096  # looked at for it, at the beginning and the end
LAST_LINES = 19  # before the last one, that are asked for a batch size


class Run(NamedTuple):
    """One run, as its files' names tell it."""

    experiment: str
    run_id: str
    log: Path  # the newest restart's
    restart: int
    earlier: int  # logs of restarts before it, which do not count
    plan: Path | None
    batch: Path | None = None  # the batch script's own log, beside


def find_runs(paths: Iterable[str | Path], tell: Callable[[str], object] = lambda _: None) -> list[Run]:
    """Every run below the directories (or of the log files) in `paths`, by experiment and id.

    `tell` is called with each thing that was passed over, and why. LogError: a path that is not there, or no run at all.
    """
    tops = [Path(path) for path in paths]
    missing = [Problem((), f"there is no {top}") for top in tops if not os.path.lexists(top)]
    if missing:
        raise LogError(*missing)
    folders: dict[Path, set[str]] = {}
    logs: dict[tuple[int, int], Path] = {}
    for log in (log for top in tops for log in _log_files(top, folders, tell)):
        try:
            status = log.stat()
        except OSError as error:
            tell(f"{log}: passed over: {error.strerror}")  # a link to nowhere, or gone by now
            continue
        if stat.S_ISREG(status.st_mode):
            logs.setdefault((status.st_dev, status.st_ino), log)
        else:
            tell(f"{log}: passed over: it is no file")  # reading a pipe would wait for ever
    if not logs:
        where = ", ".join(map(str, tops)) or "no directory"
        what = f"no run found below {where}: no file is named log-<account>.<experiment>_<id>_<restart>.out"
        raise LogError(Problem((), what, "runs keep their logs in $STAGE_PATH/logs"))
    runs = _runs(logs.values(), folders)
    return sorted(runs, key=lambda run: (run.experiment, len(run.run_id), run.run_id, run.log))


def _log_files(top: Path, folders: dict[Path, set[str]], tell: Callable[[str], object]) -> Iterator[Path]:
    """Files that are named like logs, and into `folders` what else is where they are; links to folders are not followed."""
    if not top.is_dir():
        yield top  # whatever it is called, it was asked for
        return
    for directory, inside, names in os.walk(top, onerror=lambda error: tell(_unreadable(error))):
        inside.sort()
        logs = sorted(filter(LOG_NAME.fullmatch, names))
        if logs:
            place = Path(directory)
            folders[place] = set(names)
            yield from (place / name for name in logs)


def _unreadable(error: OSError) -> str:
    return f"{error.filename}: cannot be read: {error.strerror}: runs in it are not counted"


def _runs(logs: Iterable[Path], folders: Mapping[Path, set[str]]) -> Iterator[Run]:
    """One run a directory, experiment and id; the highest restart is its log."""
    restarts: dict[tuple[Path, str, str], list[tuple[int, Path]]] = {}
    for log in logs:
        match = LOG_NAME.fullmatch(log.name)
        stem, run_id, restart = match.group("stem", "id", "restart") if match else (log.stem, "", "0")
        restarts.setdefault((log.parent, stem, run_id), []).append((int(restart), log))
    runs_in = Counter(directory for directory, _, _ in restarts)
    for (directory, stem, run_id), found in restarts.items():
        restart, log = max(found)
        names = folders.get(directory) or {path.name for path in (directory / "plan.json",) if path.is_file()}
        # where logs of several runs were put together, a plan beside them is that of one at most
        plan = directory / "plan.json" if runs_in[directory] == 1 and "plan.json" in names else None
        batch = next((name for name in sorted(names) if _is_batch_log(name, run_id)), None)
        yield Run(_experiment(log, stem), run_id, log, restart, len(found) - 1, plan, directory / batch if batch else None)


def _is_batch_log(name: str, run_id: str) -> bool:
    """NeMo-Run's sbatch_<experiment>_<id>.out."""
    return name.startswith("sbatch_") and name.endswith(f"_{run_id}.out") and run_id != ""


def _experiment(log: Path, stem: str) -> str:
    """The directory's name where the file's ends with it, as the layout has it; else what looks like an experiment."""
    directory = log.parent.name
    if directory and (stem == directory or stem.endswith(f".{directory}")):
        return directory
    for name in (stem, *reversed(log.parent.parts)):
        if match := identity.RECIPE_NAME.search(name):
            return match.group()
    return stem.partition(".")[2] or stem


def read_log(run: Run) -> Log:
    """What the run's log says; never fails: what could not be read is in `unread` or in `problems`."""
    log = Log(identity.from_name(run.experiment))
    first = last = None
    try:
        for block in blocks(run.log):
            take(log, run.log, (block.offset, len(block.raw)), scan(block))
            first, last = first or block, block
    except LogFileError as error:
        log.unread = str(error)
    _clock(log, first, last)
    identify(run, log)
    return log


def take(log: Log, path: Path, place: tuple[int, int], items: Iterable[Item]) -> None:
    """What was found in the block at `place`, its offset and length, into the log."""

    def again() -> list[Chunk]:
        return [item for item in scan(block_at(path, *place)) if isinstance(item, Chunk)]

    for item in items:
        log.take(item, again)


def read_batch_log(run: Run) -> dict[str, Ending]:
    """What the batch script's own log beside the run's tells of its end: NeMo-Run has srun's words there."""
    told: dict[str, Ending] = {}
    if run.batch:
        try:
            for block in blocks(run.batch):
                for ending in endings(block.text):
                    told.setdefault(ending.kind, ending._replace(file=run.batch.name))
        except LogFileError:
            pass  # the run's log is what counts
    return told


def _clock(log: Log, first: Block | None, last: Block | None) -> None:
    """When the log begins and ends, if its first and last lines say so."""
    began = CLOCK.search(first.raw[:CLOCK_BYTES]) if first else None
    ended = list(CLOCK.finditer(last.raw[-CLOCK_BYTES:])) if last else []
    log.started = _datetime(began) if began else None
    log.ended = _datetime(ended[-1]) if ended else None


def _datetime(match: re.Match[bytes]) -> datetime | None:
    try:
        return datetime.fromisoformat(match.group().decode())
    except ValueError:  # the 31st of June
        return None


def identify(run: Run, log: Log) -> None:
    """plan.json, else the head line, else the name with what the step lines say."""
    plan = None
    try:
        plan = run.plan.read_bytes() if run.plan else None
    except OSError as error:
        log.problems.append(f"plan.json: cannot be read: {error.strerror}")
    if plan and log.head and not _same(plan, log.head):
        log.problems.append("plan.json is not the plan in the log's head line")
    for text, file in ((plan, "plan.json"), (log.head, run.log.name)):
        try:
            if text:
                log.identity, log.plan = identity.from_plan(text, file)
                return
        except LogError as error:
            log.problems.append(identity.problem_lines(error))
    log.identity = replace(log.identity, global_batch_size=_batch(log))


def _same(plan: bytes, head: bytes) -> bool:
    if plan.strip() == head.strip():
        return True
    try:
        return bool(json.loads(plan) == json.loads(head))
    except (ValueError, RecursionError):
        return True  # which is said elsewhere


def _batch(log: Log) -> int | None:
    """Samples a step: as most of the last step lines say, else by how many were consumed; None if that is no number."""
    last = log.steps.between(log.steps.last - LAST_LINES, log.steps.last + 1)
    said = Counter(step.global_batch_size for step in last.values() if step.global_batch_size)
    if not said:
        sizes = ((step.consumed_samples or 0.0) / (number + 1) for number, step in last.items())
        said = Counter(int(size) for size in sizes if 1 <= size < 1e9 and size.is_integer())
    return max(said, key=lambda size: said[size]) if said else None
