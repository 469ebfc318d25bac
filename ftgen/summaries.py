"""Many runs at once. In: `Run`s. Out: a `Summary` of each, in the same order, by as many processes as are worth it.

A process takes some logs, or a part of a big one: what it finds there goes back, and is put together here, in order.
"""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from ftgen import catalogue, identity
from ftgen.chunk import Chunk
from ftgen.log_file import LogFileError, blocks, edges, is_packed
from ftgen.log_lines import Item, Log, scan
from ftgen.logs import CLOCK_BYTES, settle, take
from ftgen.runs import Run
from ftgen.summarize import Summary, judge, summarize
from ftgen.window import Window, checked

ALONE = 16 << 20  # bytes: less is read before another process has started
BIG = 64 << 20  # bytes of a log that several processes read
PART = 16 << 20  # bytes of it that one of them reads at a time
BATCH = 2 << 20  # bytes of logs that one of them reads at a time
RUN_BYTES = 16 << 10  # what a run takes to be found and judged, in bytes that could be read meanwhile

Progress = Callable[[int], object]  # called with the bytes that have been read since the last call


class Task(NamedTuple):
    """What one process does at a time: some runs, or a part of one."""

    runs: tuple[Run, ...]
    window: Window | None
    part: tuple[int, int] | None = None  # of the one run's log


class Part(NamedTuple):
    """What is in a part of a big log, without the lines of its steps."""

    start: int
    end: int
    items: list[Item]
    why_not: str | None = None  # it was not read to its end


def summarize_all(
    runs: Sequence[Run], *, window: Window | None = None, progress: Progress = lambda _: None, processes: int | None = None
) -> list[Summary]:
    """A summary of each run; `processes` is by default what this machine has, fewer for little work."""
    if window is not None:
        checked(window)
    processes = processes or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if processes == 1 or sum(run.size + RUN_BYTES for run in runs) < ALONE:
        return list(_one_by_one(runs, window, progress))
    tasks = list(_tasks(runs, window))
    catalogue.models(), catalogue.gpus(), catalogue.published()  # read once, not in every process
    with _context().Pool(min(processes, len(tasks)), _begin, (tasks,)) as pool:
        summaries = list(_together(tasks, pool.imap(_work, range(len(tasks))), window, progress))
        pool.close()
        pool.join()
        return summaries


def _context() -> multiprocessing.context.BaseContext:
    """A copy of this process where that is possible: it starts at once."""
    return multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)


_shared: list[Task] = []  # in each process all the tasks, so that a number is enough to say which


def _begin(tasks: list[Task]) -> None:
    """In each process: ^C is the first one's to see, and there are no cycles to be collected."""
    _shared[:] = tasks
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()


def _one_by_one(runs: Sequence[Run], window: Window | None, progress: Progress) -> Iterator[Summary]:
    for run in runs:
        yield summarize(run, window=window)
        progress(run.size)


def _tasks(runs: Sequence[Run], window: Window | None) -> Iterator[Task]:
    some: list[Run] = []
    for run in runs:
        if run.size > BIG and not _packed(run):
            yield from _batch(some, window)
            some = []
            yield from (Task((run,), window, (start, start + PART)) for start in range(0, run.size, PART))
        else:
            some.append(run)
            if sum(one.size + RUN_BYTES for one in some) > BATCH:
                yield from _batch(some, window)
                some = []
    yield from _batch(some, window)


def _batch(runs: list[Run], window: Window | None) -> Iterator[Task]:
    if runs:
        yield Task(tuple(runs), window)


def _packed(run: Run) -> bool:
    try:
        return is_packed(run.log)
    except LogFileError:
        return True


def _work(place: int) -> list[Summary] | Part:
    """One task, in a process of its own."""
    task = _shared[place]
    if task.part is None:
        return [summarize(run, window=task.window) for run in task.runs]
    start, end = task.part
    items: list[Item] = []
    try:
        for block in blocks(task.runs[0].log, start, end if end < task.runs[0].size else None):
            for item in scan(block):
                _add(items, item)
    except LogFileError as error:
        return Part(start, end, items, str(error))
    return Part(start, end, items)


def _add(items: list[Item], item: Item) -> None:
    """The item behind the others: steps that follow one another are one chunk in all of the part."""
    last = items[-1] if items else None
    if isinstance(item, Chunk):
        item = item._replace(text=b"")
        if isinstance(last, Chunk) and last.last + 1 == item.first:
            items[-1] = last._replace(last=item.last)
            return
    items.append(item)


def _together(
    tasks: Sequence[Task], results: Iterator[list[Summary] | Part], window: Window | None, progress: Progress
) -> Iterator[Summary]:
    """The summaries, in the tasks' order."""
    for (runs, _), group in groupby(zip(tasks, results, strict=True), lambda pair: (pair[0].runs, pair[0].part is None)):
        parts = []
        for _, result in group:
            if isinstance(result, Part):
                parts.append(result)
                progress(min(result.end, runs[0].size) - result.start)
            else:
                yield from result
                progress(sum(run.size for run in runs))
        if parts:
            yield judge(runs[0], _joined(runs[0], parts), window=window)


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
