"""A progress bar for reading logs. In: the runs found, and the bytes read. Out: a bar on stderr.

The bar appears after one second, and only if stderr is a terminal.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ftgen.logs.find import Run

PATIENCE_S = 1.0


@contextmanager
def reading() -> Iterator[tuple[Callable[[Run], Run], Callable[[int], None]]]:
    """Give two functions: one to pass each run through, and one to call with the number of bytes just read."""
    if not sys.stderr.isatty():
        yield lambda run: run, lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading logs"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=0)
    begin = time.monotonic()
    total = 0

    def found(run: Run) -> Run:
        nonlocal total
        total += run.size
        bar.update(task, total=total)
        return run

    def read(size: int) -> None:
        bar.advance(task, size)
        if not bar.live.is_started and time.monotonic() - begin > PATIENCE_S:
            bar.start()

    try:
        yield found, read
    finally:
        bar.stop()
