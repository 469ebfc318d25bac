"""The result of a check of `ftgen doctor`, and running a command for one.

In: a command. Out: its exit code and output; a `Finding`.
"""

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

TIMEOUT_S = 30.0


class Finding(NamedTuple):
    """The result of one check."""

    verdict: str  # "ok", "warn" (the job may run), "FAIL"
    what: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:5}  {self.what}" + (f"\n       hint: {self.hint}" if self.hint else "")


def run(*command: str | Path, timeout_s: float = TIMEOUT_S, **environment: str) -> tuple[int, str]:
    """Exit code and output of a command. The exit code is 127 if there is no such program, and 124 after the timeout."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False, env=os.environ | environment
        )
    except subprocess.TimeoutExpired:
        return 124, f"{command[0]}: no answer for {timeout_s:.0f} s"
    except OSError as error:
        return 127, f"{command[0]}: {error.strerror}"
    return done.returncode, (done.stdout + done.stderr).strip()
