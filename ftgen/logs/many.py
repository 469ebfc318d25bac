"""Many runs at once. In: the `Run`s. Out: what is made of each run and its log, by several processes."""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

from ftgen import catalogue
from ftgen.errors import LogError, Problem
from ftgen.logs.find import Run, order
from ftgen.logs.log import Log
from ftgen.logs.read import logs_of, read_log

ALONE = 4 << 20  # bytes: so little is read faster by one process than by several
RUN_BYTES = 16 << 10  # finding and judging a run takes as long as reading so many bytes
MOST_AT_ONCE = 64  # runs that a process is given at a time

Made = TypeVar("Made")
Result = TypeVar("Result")
Make = Callable[[Run, Log], Made]  # what is to be made of a run and its log
Progress = Callable[[int], object]  # called with the bytes that have been read since the last call


def read_all(
    runs: Iterable[Run], make: Make[Made], *, progress: Progress = lambda _: None, processes: int | None = None
) -> list[Made]:
    """What `make` makes of each run, in the order of `find_runs`; it goes from one process to another.

    `processes`: default as many as this machine has cores for us; one for little work. LogError: one of them was killed.
    """
    processes = processes or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    found = list(runs)
    alone = processes == 1 or sum(run.size + RUN_BYTES for run in found) < ALONE
    work = partial(_read, make)
    made: list[tuple[Any, Made]] = []
    for some, size in map(work, found) if alone else _at_once(work, found, processes):
        made += some
        progress(size)
    return [one for _, one in sorted(made, key=itemgetter(0))]


def _read(make: Make[Made], run: Run) -> tuple[list[tuple[Any, Made]], int]:
    """What is made of each run in a log, with what sorts it; and the bytes that were read."""
    return [(order(each), make(each, log)) for each, log in logs_of(run, read_log(run))], run.size


def _at_once(work: Callable[[Run], Result], runs: list[Run], processes: int) -> Iterator[Result]:
    """The results of several processes, in the order of the runs."""
    catalogue.models(), catalogue.gpus(), catalogue.published()  # read once, not in every process
    # a copy of this process, where that is possible, starts at once
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    share = min(MOST_AT_ONCE, len(runs) // (8 * processes) + 1)
    try:
        with ProcessPoolExecutor(processes, context, _begin) as pool:
            yield from pool.map(work, runs, chunksize=share)
    except BrokenProcessPool:
        killed = "a process that read logs was killed: nothing is reported"
        raise LogError(Problem((), killed, "the kernel kills when memory runs out: see dmesg")) from None


def _begin() -> None:
    """What each process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the first process is to see ^C
    gc.disable()  # it would look again and again at the steps of a long log, which make no cycles
