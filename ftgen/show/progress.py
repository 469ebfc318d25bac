"""A bar while logs are read. In: folders as they are found, and how many bytes have been read. Out: a bar on the terminal.

Nothing is shown of what takes no longer than a second, nor where stderr is no terminal.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ftgen.logs.find import Folder

PATIENCE_S = 1.0


@contextmanager
def reading() -> Iterator[tuple[Callable[[Folder], Folder], Callable[[int], None]]]:
    """Gives what each folder is to go through, and what is to be called with the bytes that have been read since."""
    if not sys.stderr.isatty():
        yield lambda folder: folder, lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading logs"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=0)
    begin = time.monotonic()
    total = 0

    def found(folder: Folder) -> Folder:
        nonlocal total
        total += folder.size
        bar.update(task, total=total)
        return folder

    def read(size: int) -> None:
        bar.advance(task, size)
        if not bar.live.is_started and time.monotonic() - begin > PATIENCE_S:
            bar.start()

    try:
        yield found, read
    finally:
        bar.stop()
