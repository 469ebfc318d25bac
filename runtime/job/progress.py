"""Lines that say what the job is doing, whole ones, as they happen; under several ranks the first alone speaks."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager


def say(text: str, *, any_rank: bool = False) -> None:
    """Print `ftgen: text` at once; ranks other than 0 are silent, unless what they say happens in one rank alone."""
    if any_rank or os.environ.get("RANK", "0") == "0":
        print(f"ftgen: {text}", flush=True)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say `what` when it begins, and the seconds it took when it ends well."""
    say(f"{what} ...")
    begin = time.monotonic()
    yield
    say(f"{what}: done in {time.monotonic() - begin:.1f} s")
