"""Many runs at once. In: the `Run`s. Out: what is made of each run and its log, by several processes."""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from typing import Any, TypeVar

from ftgen import catalogue
from ftgen.errors import LogError, Problem
from ftgen.logs.find import Run, order
from ftgen.logs.log import Log
from ftgen.logs.read import logs_of, read_log

BATCH = 4 << 20  # bytes of logs that a process reads at a time
RUN_BYTES = 16 << 10  # finding and judging a run takes as long as reading so many bytes

Made = TypeVar("Made")
Make = Callable[[Run, Log], Made]  # what is to be made of a run and its log
Progress = Callable[[int], object]  # called with the bytes that have been read since the last call


def read_all(
    runs: Iterable[Run], make: Make[Made], *, progress: Progress = lambda _: None, processes: int | None = None
) -> list[Made]:
    """What `make` makes of each run, in the order of `find_runs`; it goes from one process to another.

    `processes`: default as many as this machine has cores for us; one for little work. LogError: one of them was killed.
    """
    processes = processes or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    batches = _batches(runs)
    first = next(batches, [])
    if processes == 1 or sum(map(_weight, first)) < BATCH:
        made = [one for batch in chain([first], batches) for one in _make_batch(batch, make, progress)]
    else:
        made = _at_once(chain([first], batches), make, progress, processes)
    return [one for _, one in sorted(made, key=lambda pair: pair[0])]


def _batches(runs: Iterable[Run]) -> Iterator[list[Run]]:
    """Runs in batches of about the same work."""
    batch: list[Run] = []
    weight = 0
    for run in runs:
        batch.append(run)
        weight += _weight(run)
        if weight >= BATCH:
            yield batch
            batch, weight = [], 0
    yield batch


def _weight(run: Run) -> int:
    return run.size + RUN_BYTES


def _make_batch(batch: list[Run], make: Make[Made], progress: Progress) -> Iterator[tuple[Any, Made]]:
    for run in batch:
        yield from ((order(each), make(each, log)) for each, log in logs_of(run, read_log(run)))
        progress(run.size)


def _at_once(batches: Iterable[list[Run]], make: Make[Made], progress: Progress, processes: int) -> list[tuple[Any, Made]]:
    """With what sorts it. Batches are given out while runs are still being found."""
    catalogue.models(), catalogue.gpus(), catalogue.published()  # read once, not in every process
    # a copy of this process, where that is possible, starts at once
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    made: list[tuple[Any, Made]] = []
    pool = ProcessPoolExecutor(processes, context, _begin)
    try:
        given = [(pool.submit(_in_a_process, batch, make), sum(run.size for run in batch)) for batch in batches]
        for result, size in given:
            made += result.result()
            progress(size)
    except BrokenProcessPool:
        killed = "a process that read logs was killed: nothing is reported"
        raise LogError(Problem((), killed, "the kernel kills when memory runs out: see dmesg")) from None
    finally:
        pool.shutdown(cancel_futures=True)
    return made


def _begin() -> None:
    """What each process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the first process is to see ^C
    gc.disable()  # it would look again and again at the steps of a long log, which make no cycles


def _in_a_process(batch: list[Run], make: Make[Any]) -> list[tuple[Any, Any]]:
    return list(_make_batch(batch, make, lambda _: None))
