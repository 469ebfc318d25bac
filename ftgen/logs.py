"""Logs. In: directories. Out: a `Run` for each run below them, and the `Log` that its newest restart left.

`find_runs` only looks at names; `read_log` reads one file, as bytes, a block at a time, and decodes what it keeps.
So the runs of a whole cluster can be listed at once, and read one after the other, or in parallel.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ftgen import identity
from ftgen.errors import LogError, Problem
from ftgen.log_lines import Log, read_block

# log-<account>.<experiment>_<id>_<restart>.out; NeMo-Run writes log-<account>-<partition>.<experiment>_…
LOG_NAME = re.compile(r"log-(?P<stem>.*)_(?P<id>\d{1,18})_(?P<restart>\d{1,9})\.out", re.DOTALL)

BLOCK = 1 << 20  # bytes


class Run(NamedTuple):
    """One run, as its files' names tell it."""

    experiment: str
    run_id: str
    log: Path  # the newest restart's
    restart: int
    earlier: int  # logs of restarts before it, which do not count
    plan: Path | None


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Every run below the directories (or of the log files) in `paths`, by experiment and id; LogError for none."""
    tops = [Path(path) for path in paths]
    logs: dict[tuple[int, int], Path] = {}
    for log in (log for top in tops for log in _log_files(top)):
        try:
            status = log.stat()
        except OSError:  # a link to nowhere, or gone by now
            continue
        if stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for ever
            logs.setdefault((status.st_dev, status.st_ino), log)
    if not logs:
        where = ", ".join(map(str, tops)) or "no directory"
        what = f"no run found below {where}: no file is named log-<account>.<experiment>_<id>_<restart>.out"
        raise LogError(Problem((), what, "runs keep their logs in $STAGE_PATH/logs"))
    return sorted(_runs(logs.values()), key=lambda run: (run.experiment, len(run.run_id), run.run_id, run.log))


def _log_files(top: Path) -> Iterator[Path]:
    if not top.is_dir():
        yield top  # whatever it is called, it was asked for
    for directory, folders, names in os.walk(top):
        folders.sort()
        yield from (Path(directory, name) for name in sorted(names) if LOG_NAME.fullmatch(name))


def _runs(logs: Iterable[Path]) -> Iterator[Run]:
    """One run a directory, experiment and id; the highest restart is its log."""
    restarts: dict[tuple[Path, str, str], list[tuple[int, Path]]] = {}
    for log in logs:
        match = LOG_NAME.fullmatch(log.name)
        stem, run_id, restart = match.group("stem", "id", "restart") if match else (log.stem, "", "0")
        restarts.setdefault((log.parent, stem, run_id), []).append((int(restart), log))
    runs_in: dict[Path, int] = {}
    for directory, _, _ in restarts:
        runs_in[directory] = runs_in.get(directory, 0) + 1
    for (directory, stem, run_id), found in restarts.items():
        restart, log = max(found)
        plan = directory / "plan.json"
        # where logs of several runs were put together, a plan beside them is that of one at most
        mine = runs_in[directory] == 1 and plan.is_file()
        yield Run(_experiment(log, stem), run_id, log, restart, len(found) - 1, plan if mine else None)


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
    try:
        with run.log.open("rb") as file:
            for block in _blocks(file):
                read_block(block, log)
    except OSError as error:
        log.unread = f"the log cannot be read: {error.strerror}"
    _identify(run, log)
    return log


def _identify(run: Run, log: Log) -> None:
    """plan.json, else the head line, else the name with what the step lines say."""
    for text, file in ((run.plan, "plan.json"), (log.head, run.log.name)):
        try:
            if text:
                log.identity = identity.from_plan(text.read_bytes() if isinstance(text, Path) else text, file)
                return
        except OSError as error:
            log.problems.append(f"{file}: cannot be read: {error.strerror}")
        except LogError as error:
            log.problems.append(identity.problem_lines(error))
    log.identity = replace(log.identity, global_batch_size=log.global_batch_size or _consumed_a_step(log))


def _consumed_a_step(log: Log) -> int | None:
    """Samples a step, by the last line that counts them; None where that is no whole number."""
    step, samples = log.consumed or (0, 0.0)
    size = samples / (step + 1)
    return int(size) if 1 <= size < 1e9 and size.is_integer() else None


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """The file in pieces that end where a line does, unless the line is longer than a block."""
    rest = b""
    while piece := file.read(BLOCK):
        piece = rest + piece
        end = max(piece.rfind(b"\n"), piece.rfind(b"\r")) + 1
        if end == 0 and len(piece) >= BLOCK:
            end = len(piece)
        rest = piece[end:]
        if end:
            yield piece[:end]
    if rest:
        yield rest
