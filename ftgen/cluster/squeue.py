"""The queue. Out: the state of each of the user's jobs, as Slurm's squeue tells; None where it does not answer."""

import subprocess
from collections.abc import Mapping

TIMEOUT_S = 10
COMMAND = ("squeue", "--me", "--noheader", "--format=%A|%T|%r")


def states() -> Mapping[str, str] | None:
    """Job id to `running` or `pending (Priority)`; a job that is not there is over, or somebody else's."""
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
