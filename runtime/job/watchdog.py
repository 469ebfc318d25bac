"""Tell in which call this process waits, when the job's script asks for it.

In: the file `stacks/wanted` in $FTGEN_RUN_DIR, which the script writes when the log has not grown for FTGEN_QUIET_S seconds
(600). Out: `stacks/<command>_<rank>.txt`, the calls of the main thread, the innermost first.

The files lie on the shared file system, because the processes of a job are on many nodes, and a signal would end a
process that does not expect it.

A library can wait without releasing Python's lock. Then the thread of this module cannot run, and Python's own
faulthandler, which needs no lock, prints the calls of all threads into the log.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from pathlib import Path

from runtime.job import signals

QUIET_S = 600.0
POLLS = 20  # in FTGEN_QUIET_S: how often to look for the file
CALLS = 30  # of the innermost are written


def begin(command: str) -> None:
    """Start the thread. It ends with the process."""
    quiet = float(os.environ.get("FTGEN_QUIET_S") or QUIET_S)
    folder = Path(os.environ["FTGEN_RUN_DIR"], "stacks")
    signals.start_thread(_answer, folder, command, quiet)


def _answer(folder: Path, command: str, quiet: float) -> None:
    seen = _asked(folder)
    while True:
        faulthandler.dump_traceback_later(quiet, repeat=True)
        time.sleep(quiet / POLLS)
        if (asked := _asked(folder)) != seen:
            seen = asked
            _write(folder / f"{command}_{os.environ.get('RANK', '0')}.txt", calls_of_the_main_thread())


def calls_of_the_main_thread() -> list[str]:
    """`file:line function` of each call, the innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=CALLS, lookup_lines=False)
    return [f"{call.filename}:{call.lineno} {call.name}" for call in stack]


def _asked(folder: Path) -> int:
    try:
        return (folder / "wanted").stat().st_mtime_ns
    except OSError:
        return 0


def _write(path: Path, lines: list[str]) -> None:
    """Complete or not at all, because the script reads the file as soon as it exists."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_text("\n".join(lines) + "\n")
        partial.rename(path)
    except OSError:
        pass  # the disk is full or gone: the script says without it where the job waits
