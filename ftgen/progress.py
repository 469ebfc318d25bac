"""A bar while logs are read. In: how many bytes there are, and how many have been read. Out: a bar on the terminal.

Nothing is shown of what takes no longer than a second, nor where stderr is no terminal.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE_S = 1.0


@contextmanager
def reading(total: int) -> Iterator[Callable[[int], None]]:
    """Gives what is to be called with the bytes that have been read since the last call."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading logs"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=total)
    begin = time.monotonic()

    def advance(size: int) -> None:
        bar.advance(task, size)
        if not bar.live.is_started and time.monotonic() - begin > PATIENCE_S:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()
