"""Keep the signals of a job away from its helpers, so that the main thread always receives them.

In: a function and its arguments. Out: a running thread that ends with the process.

Python handles a signal in the main thread. If the system delivers it to another one, a long call of the main thread, such
as a sleep or a read, goes on as if nothing had happened, and the job ends only when Slurm kills it.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OF_A_JOB = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}


@contextmanager
def blocked() -> Iterator[None]:
    """Block them. A thread or a process that is started in the block keeps them blocked, from its first moment on."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, OF_A_JOB)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start_thread(work: Callable[..., None], *arguments: object) -> threading.Thread:
    """Run `work(*arguments)` in a thread that receives no signals."""
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    with blocked():
        thread.start()
    return thread
