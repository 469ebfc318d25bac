"""Many runs at once. In: the `Folder`s that they are in. Out: a `Summary` of each, or what else is made of their logs.

Several processes read while this one still looks for more. Each takes some folders, or a part of a big log: what it finds
there goes back, and is put together here, in order.
"""

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from ftgen import catalogue
from ftgen.errors import LogError, Problem
from ftgen.logs import identity
from ftgen.logs.blocks import LogFileError, blocks, edges, is_packed
from ftgen.logs.chunk import Chunk
from ftgen.logs.find import Folder, Run, order, runs_in
from ftgen.logs.log import Item, Log, scan
from ftgen.logs.read import CLOCK_BYTES, read_log, settle, take

ALONE = 8 << 20  # bytes: less is read before another process has started
BIG = 64 << 20  # bytes of a log that several processes read
PART = 16 << 20  # bytes of it that one of them reads at a time
BATCH = 4 << 20  # bytes of logs that one of them reads at a time
RUN_BYTES = 16 << 10  # what a run takes to be found and judged, in bytes that could be read meanwhile
KEPT = 8 << 20  # bytes that are not given back to the system as soon as they are free

Made = TypeVar("Made")
Make = Callable[[Run, Log], Made]  # what is to be made of a run and its log
Progress = Callable[[int], object]  # called with the bytes that have been read since the last call


class Task(NamedTuple):
    """What one process does at a time; or the run whose log several read in parts."""

    works: list[Folder | Run]
    size: int  # bytes
    big: Run | None = None


class Part(NamedTuple):
    """What is in a part of a big log, without the lines of its steps."""

    start: int
    end: int
    items: list[Item]
    why_not: str | None = None  # it was not read to its end


def read_all(
    folders: Iterable[Folder], make: Make[Made], *, progress: Progress = lambda _: None, processes: int | None = None
) -> list[Made]:
    """What `make` makes of each run, in the order of `find_runs`; it goes from one process to another.

    `processes` is by default what this machine has, fewer for little work.
    """
    processes = processes or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    coming = iter(folders)
    first = list(_until(coming, ALONE)) if processes > 1 else []
    with _without_cycles():
        if sum(map(_weight, first)) < ALONE:
            made = list(_one_by_one(chain(first, coming), make, progress))
        else:
            made = _at_once(chain(first, coming), make, progress, processes)
    return [one for _, one in sorted(made, key=lambda pair: pair[0])]


def _weight(folder: Folder) -> int:
    return folder.size + RUN_BYTES * len(folder.logs)


def _until(folders: Iterator[Folder], enough: int) -> Iterator[Folder]:
    """As many folders as make up so much work."""
    weight = 0
    while weight < enough and (folder := next(folders, None)):
        weight += _weight(folder)
        yield folder


@contextmanager
def _without_cycles() -> Iterator[None]:
    """What is made here has no cycles: to look for them in ever more of it takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _one_by_one(folders: Iterable[Folder], make: Make[Made], progress: Progress) -> Iterator[tuple[Any, Made]]:
    for folder in folders:
        for run in runs_in(folder):
            yield order(run), make(run, read_log(run))
        progress(folder.size)


def _at_once(folders: Iterable[Folder], make: Make[Made], progress: Progress, processes: int) -> list[tuple[Any, Made]]:
    """With what sorts it; tasks are given out while there are more folders to come."""
    made: list[tuple[Any, Made]] = []
    catalogue.models(), catalogue.gpus(), catalogue.published()  # read once, not in every process
    pool = ProcessPoolExecutor(processes, _context(), _begin, (make,))
    try:
        given: deque[tuple[Task, list[Future[Any]]]] = deque()
        for task in _tasks(folders):
            given.append((task, _give(pool, task)))
            while given and all(result.done() for result in given[0][1]):
                made += _got(*given.popleft(), make, progress)
        while given:
            made += _got(*given.popleft(), make, progress)
    except BrokenProcessPool:
        killed = "a process that read logs was killed: nothing is reported"
        raise LogError(Problem((), killed, "the kernel does so where memory runs out; dmesg says which")) from None
    finally:
        pool.shutdown(cancel_futures=True)
    gc.freeze()  # what was made is not looked through again until this process ends
    return made


def _context() -> multiprocessing.context.BaseContext:
    """A copy of this process where that is possible: it starts at once."""
    return multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)


_make: list[Make[Any]] = []  # in each process


def _begin(make: Make[Any]) -> None:
    """In each process: ^C is the first one's to see, and there are no cycles to be collected."""
    _make[:] = [make]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()
    bytes(KEPT)  # glibc keeps as much as was once freed at a time; without, each block's memory is new, page by page


def _tasks(folders: Iterable[Folder]) -> Iterator[Task]:
    """Big logs by themselves, all others in batches."""
    works: list[Folder | Run] = []
    size = logs = 0
    for folder in folders:
        if (more := folder.size) > BIG:
            runs = list(runs_in(folder))
            big = [run for run in runs if run.size > BIG and not _packed(run)]
            yield from (Task([], run.size, run) for run in big)
            works += [run for run in runs if run not in big] if big else [folder]
            more -= sum(run.size for run in big)
        else:
            works.append(folder)
        size += more
        logs += len(folder.logs)
        if size + RUN_BYTES * logs > BATCH:
            yield Task(works, size)
            works, size, logs = [], 0, 0
    yield Task(works, size)


def _packed(run: Run) -> bool:
    try:
        return is_packed(run.log)
    except LogFileError:
        return True


def _give(pool: ProcessPoolExecutor, task: Task) -> list[Future[Any]]:
    if not task.big:
        return [pool.submit(_read_some, task.works)]
    path, size = task.big.log, task.big.size
    ends = [*range(PART, size, PART), None]  # the last part goes as far as the log by then
    return [pool.submit(_read_part, path, start, end) for start, end in zip(range(0, size, PART), ends, strict=True)]


def _got(task: Task, results: list[Future[Any]], make: Make[Made], progress: Progress) -> list[tuple[Any, Made]]:
    """What became of a task."""
    if not task.big:
        made: list[tuple[Any, Made]] = results[0].result()
        progress(task.size)
        return made
    parts = []
    for result in results:
        parts.append(result.result())
        progress(min(PART, task.size - PART * (len(parts) - 1)))
    return [(order(task.big), make(task.big, _joined(task.big, parts)))]


def _read_some(works: list[Folder | Run]) -> list[tuple[Any, Any]]:
    """In a process of its own: what is made of each run."""
    runs = chain.from_iterable(runs_in(work) if isinstance(work, Folder) else (work,) for work in works)
    make = _make[0]
    return [(order(run), make(run, read_log(run))) for run in runs]


def _read_part(path: str, start: int, end: int | None) -> Part:
    """In a process of its own: what is in a part of a log."""
    items: list[Item] = []
    stop = start
    try:
        for block in blocks(path, start, end):
            for item in scan(block):
                _add(items, item)
            stop = block.offset + len(block.raw)
    except LogFileError as error:
        return Part(start, end or stop, items, str(error))
    return Part(start, end or stop, items)


def _add(items: list[Item], item: Item) -> None:
    """The item behind the others: steps that follow one another are one chunk in all of the part."""
    last = items[-1] if items else None
    if isinstance(item, Chunk):
        item = item._replace(text=b"")
        if isinstance(last, Chunk) and last.last + 1 == item.first:
            items[-1] = last._replace(last=item.last)
            return
    items.append(item)


def _joined(run: Run, parts: Sequence[Part]) -> Log:
    """A log that was read in parts."""
    log = Log(identity.from_name(run.experiment))
    for part in parts:
        take(log, run.log, part.start, part.end, part.items)
        log.unread = log.unread or part.why_not
    try:
        head, tail = edges(run.log, CLOCK_BYTES)
    except LogFileError as error:
        head = tail = b""
        log.unread = log.unread or str(error)
    settle(run, log, head, tail)
    return log
