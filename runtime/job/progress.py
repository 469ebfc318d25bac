"""Print progress lines into the log.

In: a text. Out: a line `ftgen: text` on stdout, printed at once. With several ranks, only rank 0 prints.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone


def say(text: str, *, any_rank: bool = False) -> None:
    """Print `ftgen: text` on rank 0. `any_rank` prints on every rank: for an event that happens on one rank only."""
    if any_rank or os.environ.get("RANK", "0") == "0":
        print(f"ftgen: {text}", flush=True)


def say_clock(step: int) -> None:
    """Print the time, and how many steps the run has made. The job's script prints it at its start and its end."""
    say(f"clock {datetime.now(timezone.utc).isoformat(timespec='seconds')} after step {step}")


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print `what` at the start of the block, and the seconds that it took if it ends without an exception."""
    say(f"{what} ...")
    begin = time.monotonic()
    yield
    say(f"{what}: done in {time.monotonic() - begin:.1f} s")
