"""Asks squeue for the jobs of the user. In: nothing. Out: their states, or None if squeue does not answer."""

import subprocess
from collections.abc import Mapping

TIMEOUT_S = 10
COMMAND = ("squeue", "--me", "--noheader", "--format=%A|%T|%r")


def states() -> Mapping[str, str] | None:
    """`running` or `pending (Priority)`, by job id. A job that is missing has ended, or belongs to another user."""
    try:
        done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    found = {}
    for line in done.stdout.splitlines():
        job, _, rest = line.partition("|")
        state, _, reason = rest.partition("|")
        found[job] = f"{state.lower()} ({reason})" if state == "PENDING" else state.lower()
    return found
