"""How forked children of this process behave: data loaders' workers, and processes that write a checkpoint.

In: nothing. Out: every child that this process forks from now on is changed. Programs that it starts are not.
"""

import ctypes
import os
import signal
from multiprocessing.popen_fork import Popen

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIBC = ctypes.CDLL(None)


def end_with_this_process() -> None:
    """Kill the children when this process ends. Otherwise they would keep its memory and its output open."""
    os.register_at_fork(after_in_child=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))


def pass_signals_by(*signals: signal.Signals) -> None:
    """Block these signals in the children. Slurm sends a signal to every process of a task, and only the task handles it.

    A data loader's worker that dies makes the training fail, and a process that writes a part of a checkpoint the save.
    multiprocessing ends its children with SIGTERM and waits for them: now that they block it, with SIGKILL.
    """
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, signals))
    if signal.SIGTERM in signals:
        setattr(Popen, "terminate", _kill)  # noqa: B010 - mypy refuses an assignment


def _kill(process: Popen) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take the end of a worker for a failure
    process.kill()
